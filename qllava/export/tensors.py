"""Tensors of a LLaVA folder under GGUF's names, computed one at a time while they are written.

    language_model.model.layers.N.self_attn.q_proj.weight  ->  blk.N.attn_q.weight      rows of q and k reordered
    vision_tower.vision_model.encoder.layers.N.mlp.fc1.X   ->  v.blk.N.ffn_up.X
    multi_modal_projector.linear_1.X                       ->  mm.0.X

Every tensor of the folder is either written or listed here as left out. Any other tensor is an error, so that no
trained weight is lost.

Shapes: D width of the tower, H width of the language model, P patches of an image.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from qllava.config import InputError
from qllava.models.weights import EMBEDDING, HEAD, Weights

Kind = GGMLQuantizationType

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_DTYPES = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_CHUNK = 2**22  # number of values that are rounded to 8 bit at a time


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    """Name in GGUF."""
    shape: tuple[int, ...]
    """Shape, in the order of torch."""
    kind: Kind
    """Type of its values in the file."""
    sources: tuple[str, ...]
    """Names of the folder's tensors that it is computed from."""
    make: Callable[[], torch.Tensor]
    """Function that reads and computes it, in the dtype of the folder."""

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size

    def data(self) -> np.ndarray[Any, Any]:
        """Return the values as they are written.

        Raises:
            InputError: A value is not finite, in the folder or after rounding.
        """
        tensor = self.make()
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{self.sources[0]} has NaN or infinite values. The training failed, or the file is corrupt; use an "
                "earlier checkpoint or copy the file again."
            )
        if self.kind == Kind.Q8_0:
            rows = max(1, _CHUNK // tensor.shape[-1])
            return np.concatenate([quantize(part.float().numpy(), self.kind) for part in tensor.split(rows)])
        kept = tensor.to(_DTYPES[self.kind]).contiguous()
        if not torch.isfinite(kept).all():
            raise InputError(f"{self.sources[0]} has values that are too large for f16; use --quantize bf16.")
        return kept.view(torch.int16).numpy() if self.kind == Kind.BF16 else kept.numpy()


def language_tensors(weights: Weights, text: Any, kind: Kind) -> list[Planned]:
    """Return the tensors of the language model with the config `text`: matrices as `kind`, norms and biases in fp32."""
    prefix = "language_model.model."
    plan = [_copied(weights, "token_embd.weight", EMBEDDING, kind)]
    if not text.tie_word_embeddings:
        plan.append(_copied(weights, "output.weight", HEAD, kind))
    plan.append(_copied(weights, "output_norm.weight", f"{prefix}norm.weight", kind))
    rope = rope_factors(text)
    if rope is not None:
        plan.append(Planned("rope_freqs.weight", tuple(rope.shape), Kind.F32, (), lambda: rope))
    by_pairs = {"attn_q": _by_pairs(text.num_attention_heads), "attn_k": _by_pairs(text.num_key_value_heads)}
    for layer in range(text.num_hidden_layers):
        for part, ours in _LAYER.items():
            for value in ("weight", "bias"):
                source = f"{prefix}layers.{layer}.{part}.{value}"
                if value == "weight" or source in weights:
                    plan.append(_copied(weights, f"blk.{layer}.{ours}.{value}", source, kind, by_pairs.get(ours)))
    return plan


def rope_factors(text: Any) -> torch.Tensor | None:
    """Return the divisors of LLaMA 3's rotation frequencies, shape (head size / 2,); None for other configs."""
    rope = text.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    size = head_size(text)
    frequency = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)  # rotations over the original context
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: the frequency stays; 0: it is divided
    factors: torch.Tensor = 1 / (kept + (1 - kept) / factor)
    return factors.float()


def head_size(text: Any) -> int:
    """Return the width of a head of the language model."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def tower_tensors(weights: Weights, vision: Any, blocks: int, kind: Kind) -> list[Planned]:
    """Return the tensors of the first `blocks` blocks of a CLIP tower: matrices as `kind`, all others in fp32.

    The place of the class token depends on the version: llama.cpp has it last since May 2025, but still assigns the
    positions as if it were first (its issue 25814). So the positions are not written as such: those of the patches are
    written as the bias of the patches, and that of the class token is added to the token. Then all versions agree.
    """
    prefix = "vision_tower.vision_model."
    token, position = f"{prefix}embeddings.class_embedding", f"{prefix}embeddings.position_embedding.weight"
    rows, width = _shape(weights, position)

    def class_token() -> torch.Tensor:
        return weights[token].float() + weights[position][0].float()

    plan = [
        Planned("v.class_embd", (width,), Kind.F32, (token, position), class_token),
        # llama.cpp's convolution does not support bf16.
        _copied(weights, "v.patch_embd.weight", f"{prefix}embeddings.patch_embedding.weight", Kind.F16),
        Planned("v.patch_embd.bias", (rows - 1, width), Kind.F32, (position,), lambda: weights[position][1:]),
        Planned("v.position_embd.weight", (rows, width), Kind.F32, (), lambda: torch.zeros(rows, width)),
    ]
    for value in ("weight", "bias"):
        plan.append(_copied(weights, f"v.pre_ln.{value}", f"{prefix}pre_layrnorm.{value}", kind))
        for block in range(blocks):
            for part, ours in _BLOCK.items():
                source = f"{prefix}encoder.layers.{block}.{part}.{value}"
                plan.append(_copied(weights, f"v.blk.{block}.{ours}.{value}", source, kind))
    return plan


def projector_tensors(weights: Weights, activation: str, kind: Kind) -> list[Planned]:
    """Return the tensors of the projector's two layers.

    llama.cpp always computes a GELU between them. A linear projector W x + b passes it unchanged, because
    gelu(x) - gelu(-x) = x: the first layer is [I; -I] and the second [W, -W].
    """
    names = [f"multi_modal_projector.linear_{number}.{part}" for number in (1, 2) for part in ("weight", "bias")]
    first, bias_1, second, bias_2 = names
    hidden, width = _shape(weights, first)[0], _shape(weights, second)[0]

    def bias(name: str, size: int) -> torch.Tensor:
        return weights[name] if name in weights else torch.zeros(size)

    def folded() -> tuple[torch.Tensor, torch.Tensor]:
        outer = weights[second].float()
        return outer @ weights[first].float(), outer @ bias(bias_1, hidden).float() + bias(bias_2, width).float()

    if activation != "linear":
        return [
            _copied(weights, "mm.0.weight", first, kind),
            Planned("mm.0.bias", (hidden,), Kind.F32, (bias_1,), lambda: bias(bias_1, hidden)),
            _copied(weights, "mm.2.weight", second, kind),
            Planned("mm.2.bias", (width,), Kind.F32, (bias_2,), lambda: bias(bias_2, width)),
        ]
    size = _shape(weights, first)[1]
    both = torch.cat([torch.eye(size), -torch.eye(size)])
    return [
        Planned("mm.0.weight", (2 * size, size), kind, (), lambda: both),
        Planned("mm.0.bias", (2 * size,), Kind.F32, (), lambda: torch.zeros(2 * size)),
        Planned("mm.2.weight", (width, 2 * size), kind, tuple(names), lambda: torch.cat([w := folded()[0], -w], dim=1)),
        Planned("mm.2.bias", (width,), Kind.F32, tuple(names), lambda: folded()[1]),
    ]


def check_sizes(weights: Weights, text: Any, vision: Any) -> None:
    """Raise InputError if config.json and the weights belong to different models, by one tensor of each kind."""
    size, hidden, width = head_size(text), text.hidden_size, vision.hidden_size
    layer, tower = "language_model.model.layers.0.", "vision_tower.vision_model."
    wanted = {
        EMBEDDING: (text.vocab_size, hidden),
        f"{layer}self_attn.q_proj.weight": (text.num_attention_heads * size, hidden),
        f"{layer}self_attn.k_proj.weight": (text.num_key_value_heads * size, hidden),
        f"{layer}mlp.up_proj.weight": (text.intermediate_size, hidden),
        f"{tower}embeddings.patch_embedding.weight": (width, 3, vision.patch_size, vision.patch_size),
        f"{tower}embeddings.position_embedding.weight": ((vision.image_size // vision.patch_size) ** 2 + 1, width),
        f"{tower}encoder.layers.0.mlp.fc1.weight": (vision.intermediate_size, width),
        "multi_modal_projector.linear_2.bias": (hidden,),
    }
    for name, shape in wanted.items():
        found = weights.shape(name) if name in weights else shape
        if found != shape:
            raise InputError(
                f"{name} has the shape {found}, which should be {shape} according to config.json; take both from the "
                "same model."
            )


def check_nothing_is_lost(weights: Weights, plans: list[Planned], vision: Any, blocks: int, tied: bool) -> None:
    """Raise InputError if a tensor of the folder is neither written nor known to be unused."""
    unused = [r"vision_tower\.vision_model\.post_layernorm\.", r"\.position_ids$", r"\.rotary_emb\.inv_freq$"]
    unused += [rf"vision_tower\.vision_model\.encoder\.layers\.{n}\." for n in range(blocks, vision.num_hidden_layers)]
    unused += [r"^language_model\.lm_head\.weight$"] if tied else []
    written = {source for planned in plans for source in planned.sources}
    lost = [name for name in weights if name not in written and not any(re.search(rule, name) for rule in unused)]
    if lost:
        raise InputError(
            f"{lost[0]} has no place in GGUF's layout of a LLaVA ({len(lost)} such tensors); expected a LLaMA or "
            "Mistral language model and a CLIP tower, as `qllava merge` or llava-hf writes them."
        )


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor on disk; raise InputError if there is none of this name."""
    if name not in weights:
        raise InputError(f"The weights lack {name}; expected a folder that `qllava merge` or llava-hf wrote.")
    return weights.shape(name)


def _copied(
    weights: Weights, name: str, source: str, kind: Kind, change: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Planned:
    """Return a tensor under another name; as in llama.cpp, vectors are in fp32, and rows not divisible by 32 in f16."""
    shape = _shape(weights, source)
    if len(shape) == 1:
        kind = Kind.F32
    elif kind == Kind.Q8_0 and shape[-1] % 32:
        kind = Kind.F16
    return Planned(name, shape, kind, (source,), lambda: change(weights[source]) if change else weights[source])


def _by_pairs(heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that puts the rows of q or k into llama.cpp's order.

    llama.cpp rotates a row with its neighbour, while transformers rotates it with the row half a head further.
    """
    return lambda t: t.reshape(heads, 2, -1, *t.shape[1:]).transpose(1, 2).reshape(t.shape)
