"""NF4 with double quantization: packing a weight as in training, and dequantizing it to fp32.

bitsandbytes dequantizes to the type that was packed. For a 16-bit weight that adds a rounding which the codes and their
scale do not have, and which removes a small delta that is added afterwards. `unpacked` is the only place where qllava
turns codes into a weight; the products in training are computed by bitsandbytes.

bitsandbytes finds the codes of block scales by table on a CPU and by search on CUDA: 0.2 % of them differ, and 0.08 %
of the weights. Merging a run on another kind of device than it was trained on gives a base that differs by as much.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor

KIND: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
"""Arguments of bitsandbytes for NF4 with double quantization."""


def unpacked(packed: Tensor, state: QuantState) -> Tensor:
    """Return the weight encoded by NF4 codes and their scales, in fp32 whatever type was packed."""
    exact = copy.copy(state)
    exact.dtype = torch.float32
    return dequantize_4bit(packed, exact).reshape(state.shape)


def as_quantized(weight: Tensor) -> Tensor:
    """Return a weight as seen in training: packed in its own type, dequantized to fp32."""
    packed, state = quantize_4bit(weight.contiguous(), blocksize=64, **KIND)
    return unpacked(packed, state)
