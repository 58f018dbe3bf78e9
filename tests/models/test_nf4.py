"""NF4 is unpacked in fp32, whatever type was packed, everywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qllava.models.nf4 import as_quantized, unpacked
from qllava.training.step.exact import _weight

SOURCES = Path(__file__).parents[2] / "qllava"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_rounding_but_that_of_the_codes(dtype: torch.dtype) -> None:
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)
    found = as_quantized(weight)
    assert found.dtype == torch.float32
    assert torch.equal(found, as_quantized(weight.float()))
    assert not torch.equal(found, found.to(dtype).float()), "a delta would vanish in what was rounded before"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_the_weight_that_a_layer_multiplies_with(dtype: torch.dtype) -> None:
    kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True, "compute_dtype": torch.float32}
    layer: Any = bnb.nn.Linear4bit(64, 32, bias=False, **kind)
    layer.weight.data = layer.weight.data.to(dtype)
    layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    weight = unpacked(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(_weight(layer), weight)
    torch.testing.assert_close(layer(torch.eye(64)).T, weight, rtol=0, atol=1e-7)
    state = layer.weight.quant_state
    assert state.dtype == dtype, "the layer's own state stays as it was"


def test_a_layer_of_whole_weights() -> None:
    layer = nn.Linear(8, 4).to(torch.bfloat16)
    assert torch.equal(_weight(layer), layer.weight.float())


def test_nobody_else_unpacks() -> None:
    """A second place would round as it likes."""
    places = [path.name for path in SOURCES.rglob("*.py") if re.search(r"\bdequantize_4bit\b", path.read_text())]
    assert places == ["nf4.py"]
