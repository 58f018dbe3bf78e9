"""qllava builds a LLaVA (vision tower, projector, LLaMA) and tunes it with QLoRA on one consumer GPU.

    import qllava
    qllava.load("runs/finetune_lora").answer("photo.jpg", "What is this?")

Importing the package costs nothing: torch and transformers are imported by what needs them, when it is called.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qllava.inference import Chat

# On its import bitsandbytes warns of an optional CPU kernel that nobody here misses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(model: str, *, load_in_4bit: bool = False, base_model: str | Path | Sequence[str | Path] = ()) -> Chat:
    """A model that answers questions about images.

    `model` is `nano` (the newest finished nano run), a run folder, a merged folder, or a hub name. `load_in_4bit` keeps
    the language model in NF4, and `base_model` says where the base of a run is now, if it has moved. Raises
    `qllava.config.InputError` when the model does not exist.
    """
    from qllava.inference import load as load_chat

    return load_chat(model, load_in_4bit=load_in_4bit, base_model=base_model)
