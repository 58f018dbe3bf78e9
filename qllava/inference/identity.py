"""Which model answered: a fingerprint of all that decides a greedy answer, whatever path or name it was loaded by.

A path does not identify a model: a run is trained again, a merge replaced, a hub name updated. A file of answers
carries the fingerprint of whoever gave them, so that the answers of one model are never taken for another's.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from qllava.inference.chat import Chat
from qllava.inference.generate import ends_of

_VALUES = 256
"""Evenly spaced values of each tensor: training moves nearly all of them."""
_DIGITS = 16


def fingerprint_of(chat: Chat) -> str:
    """Hash the weights as they are in memory, the vocabulary, the image processor, the chat template and end tokens.

    The base, the adapter, and what they are held in (4 bit, bf16, fp32) all change it; the device does not.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    processor = chat.processor
    images = processor.image_processor.to_dict()
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    # Of `generation_config` alone: what else it holds is a recommendation, which answers do not follow.
    ends = ends_of(chat.model, processor.tokenizer)
    said = [processor.chat_template, images, vocabulary, _shapes(chat.model.config.to_dict()), ends]
    digest.update(json.dumps(said, sort_keys=True, default=str).encode(errors="surrogatepass"))
    tensors = dict(chat.model.named_parameters(remove_duplicate=False)) | dict(chat.model.named_buffers())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(_sample(tensors[name].data))
    return digest.hexdigest()[:_DIGITS]


def _shapes(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config without what says where it was loaded from and by which version."""
    return {
        name: _shapes(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in ("_name_or_path", "transformers_version")
    }


def _sample(tensor: Any) -> bytes:
    """Evenly spaced values of a tensor, as bytes."""
    flat = tensor.reshape(-1)
    if not flat.numel():
        return b""
    places = torch.linspace(0, flat.numel() - 1, min(flat.numel(), _VALUES), dtype=torch.float64)
    values: bytes = flat[places.long().to(flat.device)].to("cpu", torch.float64).numpy().tobytes()
    return values
