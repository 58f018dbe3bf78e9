"""NF4 with double quantization: packing a weight as training does, and unpacking it in fp32.

bitsandbytes unpacks into the type that was packed. Of a 16-bit weight that is one rounding more than the code and its
scale have, and a small delta that is added afterwards vanishes in it. `unpacked` is the one place where qllava turns
codes into a weight; the products that training computes from them are bitsandbytes' own.

bitsandbytes finds the codes of block scales by table on a CPU and by search on CUDA: 0.2 % of them differ, and 0.08 %
of the weights. Merging a run on the other kind of device than it was trained on gives a base that differs by as much.
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
    """Return the weight that NF4 codes and their scales encode, in fp32 whatever type was packed."""
    exact = copy.copy(state)
    exact.dtype = torch.float32
    return dequantize_4bit(packed, exact).reshape(state.shape)


def as_quantized(weight: Tensor) -> Tensor:
    """Return a weight as training saw it: packed in its own type, unpacked in fp32."""
    packed, state = quantize_4bit(weight.contiguous(), blocksize=64, **KIND)
    return unpacked(packed, state)
