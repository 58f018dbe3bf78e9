"""A LLaVA of any size with random weights, made in seconds without a download; its language model is in NF4.

Everything that time and memory depend on is as in a real model: NF4 with double quantization for the linear layers of
the language model, everything else in the compute type, the projector in fp32. Each layer is made on its device, so no
16-bit copy of the model ever exists. The same seed and device give the same weights.
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
"""Standard deviation of the 16 values of NF4."""
BLOCK, OUTER_BLOCK = 64, 256


def random_llava(config: LlavaConfig, *, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """Return a frozen LlavaForConditionalGeneration in eval mode, marked as a 4-bit model.

    Args:
        config: Config of the model; it is not changed.
        device: Device of the weights.
        dtype: Type that the layers compute in, and of the weights that are not in NF4.
        seed: Seed of the weights.
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
    """Replace the linear layers by 4-bit ones."""
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
    # Otherwise, on some CPUs, a pass without gradients repacks the weights in place, and training is silently wrong.
    packed.support_avx512bf16_for_cpu = False
    return packed


def _scales(shape: torch.Size, device: str, dtype: torch.dtype) -> QuantState:
    """Return the quantization state of a 4-bit matrix; every block has the same scale, itself quantized to 8 bits.

    Random bytes use all 16 values equally often, so the scale follows from the values' standard deviation.
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
    """Return the 16 values of NF4, and the 256 values of its scales."""
    return bnb.get_4bit_type("nf4", device=device), bnb.create_dynamic_map().to(device)


def _fill(module: nn.Module, model: Any, device: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Give values to the parameters and buffers of the module itself."""
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
    """Return the values of a buffer: positions in order, or rotary frequencies as the module computes them."""
    if name == "position_ids":
        return torch.arange(buffer.shape[-1], device=device)[None]
    if name in ("inv_freq", "original_inv_freq"):
        frequencies: torch.Tensor = type(module)(module.config).inv_freq.to(device)
        return frequencies
    raise ValueError(f"the values of the buffer {name} of {type(module).__name__} are not known; add them to _buffer")
