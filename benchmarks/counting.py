"""Count of the floating point operations that torch really computes; a multiplication and an addition are two.

torch's counter knows matrix products, convolutions and attention. The 4-bit layers are added here: their forward pass
is one operation of bitsandbytes; their backward pass unpacks and multiplies, which torch's counter sees. Attention is
counted in full even where a causal kernel skips half of it, in the same way for every system.
"""

from __future__ import annotations

from math import prod
from typing import Any

import bitsandbytes  # noqa: F401  # defines the operation that is counted
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def counter() -> FlopCounterMode:
    """Return a context manager that counts FLOPs; its `get_total_flops()` returns the total."""
    aten: Any = torch.ops.aten
    told = {
        torch.ops.bitsandbytes.gemm_4bit: _packed_product,
        # torch before 2.15 counts attention only on a GPU.
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=told)


def _packed_product(a: Any, b: Any, shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Return the FLOPs of (..., K) times a packed (N, K)."""
    n, k = shape
    return 2 * prod(a[:-1]) * int(n) * int(k)


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))
