"""Fingerprint of a model: a hash of everything that decides a greedy answer, whatever its path or name.

A path does not identify a model: a run may be trained again, a merge replaced, a hub model updated. A file of answers
contains the fingerprint of the model that gave them, so that answers of one model are never attributed to another.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from qllava.inference.chat import Chat
from qllava.inference.generate import ends_of

_VALUES = 256
"""Number of evenly spaced values hashed per tensor; training changes nearly all values."""
_DIGITS = 16


def fingerprint_of(chat: Chat) -> str:
    """Hash the weights in memory, the vocabulary, the image processor, the chat template and the end tokens.

    Base, adapter and the type of the weights (4 bit, bf16, fp32) all change the fingerprint; the device does not.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    processor = chat.processor
    images = processor.image_processor.to_dict()
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    # Only the end tokens of `generation_config`: its other values are recommendations, which answers do not follow.
    ends = ends_of(chat.model, processor.tokenizer)
    said = [processor.chat_template, images, vocabulary, _shapes(chat.model.config.to_dict()), ends]
    digest.update(json.dumps(said, sort_keys=True, default=str).encode(errors="surrogatepass"))
    tensors = dict(chat.model.named_parameters(remove_duplicate=False)) | dict(chat.model.named_buffers())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(_sample(tensors[name].data))
    return digest.hexdigest()[:_DIGITS]


def _shapes(config: dict[str, Any]) -> dict[str, Any]:
    """Return a model's config without the keys for its location and version."""
    return {
        name: _shapes(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in ("_name_or_path", "transformers_version")
    }


def _sample(tensor: Any) -> bytes:
    """Return evenly spaced values of a tensor, as bytes."""
    flat = tensor.reshape(-1)
    if not flat.numel():
        return b""
    places = torch.linspace(0, flat.numel() - 1, min(flat.numel(), _VALUES), dtype=torch.float64)
    values: bytes = flat[places.long().to(flat.device)].to("cpu", torch.float64).numpy().tobytes()
    return values
