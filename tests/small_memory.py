"""A planted fault: memory runs out when a LLaVA answers more than a number of prompts at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def small_memory(patch: pytest.MonkeyPatch, most: int, error: BaseException = OUT_OF_MEMORY) -> list[int]:
    """Make every LLaVA raise an error when it answers more than `most` prompts at once.

    Returns:
        A list to which the number of prompts of each attempt is appended.
    """
    sizes: list[int] = []
    plain = LlavaForConditionalGeneration.generate

    def generate(self: Any, *arguments: Any, **named: Any) -> Any:
        sizes.append(len(named["input_ids"]))
        if sizes[-1] > most:
            raise type(error)(*error.args)
        return plain(self, *arguments, **named)

    patch.setattr(LlavaForConditionalGeneration, "generate", generate)
    return sizes
