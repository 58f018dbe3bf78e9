"""A LLaVA of any size with random weights, in seconds and without a download; the language model's are packed NF4.

What time and memory depend on is as in a real one: NF4 with double quantization for the linear layers of the language
model, everything else in the compute type, the projector in fp32. Each layer is made where it will lie, so no copy of
the model in 16 bits ever exists. The same seed and device give the same weights.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

STD = 0.02
VALUES_STD = 0.517
"""Of the 16 values of NF4."""
BLOCK, OUTER_BLOCK = 64, 256


def random_llava(config: LlavaConfig, *, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A LlavaForConditionalGeneration in eval mode, frozen, marked as a 4-bit model.

    dtype: what the layers compute in, and what is not packed is held in.
    """
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(copy.deepcopy(config))
    generator = torch.Generator(device).manual_seed(seed)
    _pack(model.model.language_model, device, dtype, generator)
    for module in model.modules():
        if not isinstance(module, Linear4bit):
            _fill(module, model, device, dtype, generator)
    model.model.multi_modal_projector.float()
    if config.tie_word_embeddings:
        model.tie_weights()
    model.generation_config = GenerationConfig()
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False).eval()


def _pack(language_model: nn.Module, device: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Put packed layers in the place of the linear ones."""
    for parent in list(language_model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, _packed(layer, device, dtype, generator))


def _packed(layer: nn.Linear, device: str, dtype: torch.dtype, generator: torch.Generator) -> Linear4bit:
    options: dict[str, Any] = {"compute_dtype": dtype, "compress_statistics": True, "quant_type": "nf4"}
    packed = Linear4bit(layer.in_features, layer.out_features, bias=False, device="meta", **options)
    count = layer.weight.numel()
    data = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, device=device, generator=generator)
    state = _scales(layer.weight.shape, device, dtype)
    packed.weight = Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="nf4")
    packed.weight.module = packed
    packed.quant_state = state
    # Otherwise a pass without gradients repacks the weights in place on some CPUs, and training goes wrong in silence.
    packed.support_avx512bf16_for_cpu = False
    return packed


def _scales(shape: torch.Size, device: str, dtype: torch.dtype) -> QuantState:
    """What bitsandbytes keeps beside a packed matrix: here every block has the same scale, packed in 8 bits too.

    Random bytes hit all 16 values alike, so the scale follows from their spread.
    """
    values, scales = _codes(device)
    blocks = -(-shape.numel() // BLOCK)
    outer = torch.full((-(-blocks // OUTER_BLOCK),), STD / VALUES_STD, device=device)
    return QuantState(
        absmax=torch.full((blocks,), 255, dtype=torch.uint8, device=device),  # the largest of the 8-bit values, 1.0
        shape=shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=values,
        quant_type="nf4",
        offset=torch.zeros((), device=device),
        state2=QuantState(absmax=outer, code=scales, blocksize=OUTER_BLOCK, dtype=torch.float32),
    )


@cache
def _codes(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 values of NF4, and the 256 of its scales."""
    return bnb.get_4bit_type("nf4", device=device), bnb.create_dynamic_map().to(device)


def _fill(module: nn.Module, model: Any, device: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Give the module's own parameters and buffers values."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        value = torch.empty(parameter.shape, device=device, dtype=dtype)
        if "norm" in type(module).__name__.lower():
            value.fill_(0.0 if name == "bias" else 1.0)
        elif name == "bias":
            value.zero_()
        else:
            value.normal_(std=STD, generator=generator)
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        module.register_buffer(name, _buffer(module, name, buffer, device), persistent=False)


def _buffer(module: Any, name: str, buffer: torch.Tensor, device: str) -> torch.Tensor:
    """Positions count up; the rotary frequencies are computed as the module does it."""
    if name == "position_ids":
        return torch.arange(buffer.shape[-1], device=device)[None]
    if name in ("inv_freq", "original_inv_freq"):
        frequencies: torch.Tensor = type(module)(module.config).inv_freq.to(device)
        return frequencies
    raise ValueError(f"{type(module).__name__} has the buffer {name}, whose values are not known here")
