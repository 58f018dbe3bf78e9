"""Toolkit that builds a LLaVA (vision tower, projector, LLaMA) and tunes it with QLoRA on one consumer GPU.

    import qllava
    qllava.load("runs/finetune_lora").answer("photo.jpg", "What is this?")

Importing the package is fast: torch and transformers are imported when a function that needs them is called.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qllava.inference import Chat

# bitsandbytes warns on import about an optional CPU kernel that is not needed here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(model: str, *, load_in_4bit: bool = False, base_model: str | Path | Sequence[str | Path] = ()) -> Chat:
    """Load a model that answers questions about images.

    Args:
        model: `nano` (the newest finished nano run), a run folder, a merged model's folder, or a hub name.
        load_in_4bit: Whether to keep the language model in NF4.
        base_model: New location of a run's base model, if it has moved.

    Raises:
        qllava.config.InputError: The model does not exist.
    """
    from qllava.inference import load as load_chat

    return load_chat(model, load_in_4bit=load_in_4bit, base_model=base_model)
