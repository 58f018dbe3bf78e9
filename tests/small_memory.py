"""A planted fault: memory runs out while a LLaVA answers more prompts at once than so many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def small_memory(patch: pytest.MonkeyPatch, most: int, error: BaseException = OUT_OF_MEMORY) -> list[int]:
    """Let every LLaVA raise an error like this one when it answers more prompts; returns the sizes of all attempts."""
    sizes: list[int] = []
    plain = LlavaForConditionalGeneration.generate

    def generate(self: Any, *arguments: Any, **named: Any) -> Any:
        sizes.append(len(named["input_ids"]))
        if sizes[-1] > most:
            raise type(error)(*error.args)
        return plain(self, *arguments, **named)

    patch.setattr(LlavaForConditionalGeneration, "generate", generate)
    return sizes
