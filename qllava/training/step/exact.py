"""The forward pass of a pack: the same loss as its samples one by one, at lower cost.

    images --tower (no gradient), once each--> --projector--> features --gathered--> at the image tokens
    tokens --embeddings--> + features --language model, by packs--> hidden --those that predict--> head --> log_probs

With dropout 0 the savings change no result (with dropout, questions about one image share the mask of its tokens, and
random numbers fall on other tokens): tokens that predict nothing get no logits, and an image is encoded once however
many samples show it. Four more shortcuts are separate functions; each changes a model instance and can be turned off
(settings `stop_tower`, `prune_last_layer`, `lora_first`, `compile_layers`):

- `stop_tower`: layers of the vision tower after the one whose features are used are not computed.
- `prune_last_layer`: the last layer of the language model computes keys and values for all tokens, and everything else
  only at positions that predict a learned token.
- `lora_first`: LoRA's product is computed before the base's. When a layer is recomputed in the backward pass, torch
  stops as soon as it has what it needs; nothing needs the product of the frozen 4-bit base, so the last one of a layer
  is saved.
- `compile_layers`: the operations between the matrix products of a decoder layer, which are its norms and the gate of
  its MLP, become one compiled kernel each. The products, 4-bit and LoRA's, and attention are library kernels already.

S tokens, P image tokens of a pack, I its images, L its learned tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, rotate_half
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.utils import ModelOutput

from qllava.data.packing import Group
from qllava.image_layout import ImageLayout
from qllava.models.lora import Lora
from qllava.models.nf4 import unpacked
from qllava.models.stream import features_at
from qllava.training.step.attention import Kernel, Sight, pack_attention

MOST_LOGITS = 1 << 25
"""Maximum number of logits held at once: 128 MB in fp32, for 1,048 learned tokens and a vocabulary of 32,000."""

_STEPS = 6
"""Twice the three products that count: the small products of a LoRA are bound by memory. Measured with nano."""


@dataclass
class PackOutput(ModelOutput):
    """Values from which TRL computes its loss and metrics, for the learned tokens only; (L,) each."""

    log_probs: Tensor | None = None
    """Log-probabilities of the correct tokens, with gradients."""
    label_mask: Tensor | None = None
    """True everywhere except in a weightless pack, because only learned tokens are included."""
    entropy: Tensor | None = None
    """Entropy of the predictions, in nats."""
    is_top1: Tensor | None = None
    """Whether the correct token was the most likely one."""


class Switches(Protocol):
    """The shortcuts to take; a run's settings have these attributes."""

    @property
    def stop_tower(self) -> bool:
        """Whether the vision tower stops at the layer whose features are used."""

    @property
    def prune_last_layer(self) -> bool:
        """Whether the last layer is computed only where a token is learned."""

    @property
    def lora_first(self) -> bool:
        """Whether LoRA's product is computed before the base's."""


def take_shortcuts(model: Any, switches: Switches) -> None:
    """Apply the selected shortcuts to a LlavaForConditionalGeneration, with or without LoRA."""
    if switches.stop_tower:
        stop_tower(model)
    if switches.prune_last_layer:
        prune_last_layer(model.model.language_model)
    if switches.lora_first:
        lora_first(model)


def teach_packs(model: Any, kernel: Kernel = "groups") -> None:
    """Let a LlavaForConditionalGeneration's forward accept packs: a call with `pack_groups` computes a pack.

    The method is set on the instance, so that calls work through whatever wraps the model (peft, accelerate, DDP).
    """
    plain = model.forward

    @wraps(plain)  # `generate` reads its signature
    def forward(*args: Any, pack_groups: Sequence[Group] | None = None, **kwargs: Any) -> Any:
        if pack_groups is None:
            return plain(*args, **kwargs)
        return pack_forward(model, pack_groups=pack_groups, kernel=kernel, **kwargs)

    model.forward = forward


def pack_forward(
    model: Any,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    image_places: Tensor,
    features: Tensor,
    learned: Tensor,
    targets: Tensor,
    learned_counts: Sequence[int],
    pack_groups: Sequence[Group],
    kernel: Kernel = "groups",
    pixel_values: Tensor | None = None,
    weightless: bool = False,
    **_: Any,
) -> PackOutput:
    """Compute the scores of a pack's learned tokens; the arguments are those of `data.collate.pack_tensors`.

    Args:
        model: A LlavaForConditionalGeneration whose language model is inside `looking_at`.
        input_ids: (1, S).
        position_ids: (1, S).
        image_places: (P,) positions of the image tokens.
        features: (P,) indices into the features of all images, one image after the other.
        learned: (L,) positions that predict a learned token.
        targets: (L,) the tokens to predict.
        learned_counts: Number of learned tokens of each branch.
        pack_groups: Layout of the pack.
        kernel: Attention kernel.
        pixel_values: (I, 3, H, W); None for a pack without images.
        weightless: Make all gradients zero and count nothing.
    """
    embeddings = model.model.language_model.get_input_embeddings()(input_ids[0])
    if pixel_values is not None:
        seen = image_features(model, pixel_values)
        embeddings = embeddings.index_put((image_places,), seen[features].to(embeddings.dtype))
    elif torch.is_grad_enabled():
        # Without images the projector learns nothing, and its gradient must be zero, not missing: it is the only
        # gradient of stage 1, and the ranks wait for it.
        learning = [p.sum() for p in model.model.multi_modal_projector.parameters() if p.requires_grad]
        embeddings = embeddings + 0 * sum(learning)
    hidden = model.model.language_model(
        inputs_embeds=embeddings[None],
        position_ids=position_ids,
        attention_mask=None,
        use_cache=False,
        sight=Sight(tuple(pack_groups), learned, tuple(learned_counts), kernel),
    ).last_hidden_state[0]
    # A pruned last layer returned the learned positions only.
    predicting = hidden if len(hidden) == len(learned) else hidden[learned]
    log_probs, entropy, is_top1 = _scores(model.lm_head, predicting, targets)
    if weightless:
        return PackOutput(0 * log_probs, torch.zeros_like(is_top1), 0 * entropy, torch.zeros_like(is_top1))
    return PackOutput(log_probs, torch.ones_like(is_top1), entropy, is_top1)


def _scores(head: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score the targets, (L, D), (L,) -> log-probability, entropy and whether it was the most likely, (L,) each.

    If a pack has many logits, they are computed in pieces, and again in the backward pass.
    """
    size = max(1, MOST_LOGITS // head.weight.shape[0])
    if len(hidden) <= size:
        return _score(head, hidden, targets)
    pieces = [
        checkpoint(_score, head, some, of, use_reentrant=False, preserve_rng_state=False)
        for some, of in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    log_probs, entropy, is_top1 = (torch.cat(of) for of in zip(*pieces, strict=True))
    return log_probs, entropy, is_top1


def _score(head: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    likely = head(hidden).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(likely.exp() * likely).sum(-1)
        is_top1 = likely.argmax(-1) == targets
    return likely.gather(-1, targets[:, None])[:, 0], entropy, is_top1


def image_features(model: Any, pixel_values: Tensor) -> Tensor:
    """Compute the features of all images, (I, 3, H, W) -> (F, D): the tower without gradients, then the projector."""
    layer = model.config.vision_feature_layer
    tower = model.model.vision_tower
    with torch.no_grad():
        stopped = getattr(tower, "features_at", None)
        chosen = (
            stopped(pixel_values, layer)
            if stopped is not None
            else tower(pixel_values, output_hidden_states=True).hidden_states[layer]
        )
    used = chosen[:, ImageLayout.of_config(model.config).first :]
    seen: Tensor = model.model.multi_modal_projector(used)
    return seen.flatten(0, 1)


def stop_tower(model: Any) -> None:
    """Stop the vision tower at the layer whose features are used, while a pack is computed."""
    tower = model.model.vision_tower
    inner = getattr(tower, "vision_model", tower)
    tower.features_at = lambda pixel_values, layer: features_at(inner, [pixel_values], layer)[0]


def prune_last_layer(language_model: Any) -> None:
    """Let the last layer of a LLaMA or Mistral compute only what the learned positions of a pack need.

    It is never recomputed: the backward pass begins with it, so it would be recomputed right away, and what it holds
    is small. Calls without a pack are unchanged.

    Raises:
        TypeError: The last layer is not one of a LLaMA or Mistral.
    """
    layer = language_model.layers[-1]
    if not isinstance(layer, LlamaDecoderLayer | MistralDecoderLayer):
        raise TypeError(f"expected a decoder layer of a LLaMA or Mistral, got {type(layer).__name__}")
    layer.forward = partial(_pruned, layer, layer.forward)  # type: ignore[method-assign]


def _pruned(
    layer: Any,
    plain: Callable[..., Any],
    hidden_states: Tensor,
    *args: Any,
    sight: Sight | None = None,
    **kwargs: Any,
) -> Any:
    """Compute a decoder layer at the learned positions of a pack, (1, S, D) -> (1, L, D)."""
    if sight is None:
        return plain(hidden_states, *args, **kwargs)
    attention, places = layer.self_attn, sight.learned
    cos, sin = kwargs["position_embeddings"]
    every = layer.input_layernorm(hidden_states)
    few = every[:, places]
    query, key, value = (
        project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project, x in ((attention.q_proj, few), (attention.k_proj, every), (attention.v_proj, every))
    )
    query, key = _rotated(query, cos[:, places], sin[:, places]), _rotated(key, cos, sin)
    dropout = attention.attention_dropout if attention.training else 0.0
    out, _ = pack_attention(attention, query, key, value, None, sight=sight, scaling=attention.scaling, dropout=dropout)
    hidden = hidden_states[:, places] + attention.o_proj(out.flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (1, H, S, D) by the angles of its positions, (1, S, D)."""
    turned: Tensor = x * cos[:, None] + rotate_half(x) * sin[:, None]
    return turned


def lora_first(model: nn.Module) -> None:
    """Compute every LoRA of a model before its base layer during training, or merged into it where that is cheaper.

    A kind of LoRA that needs more than the layer's input is left as peft computes it.

    Raises:
        InputError: The kind of LoRA is not known.
    """
    lora = Lora.of_model(model)
    if lora is None or not lora.goes_first:
        return
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            module.forward = partial(_lora_first, module, module.forward)


def _lora_first(layer: Any, plain: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute (alpha / r) B A x + W x, (..., in) -> (..., out), in the base's type as peft does."""
    if not layer.training or layer.disable_adapters or layer.merged or args or kwargs:
        return plain(x, *args, **kwargs)
    a, b, scaling = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
    # Under autocast torch chooses the type; otherwise LoRA computes in its own.
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and x.dtype == torch.float32 and _is_large(layer):
        whole = torch.addmm(_weight(layer.base_layer), b.weight, a.weight, alpha=scaling)
        return linear(x, whole, layer.base_layer.bias)
    given = x if autocast else x.to(a.weight.dtype)
    delta = b(a(layer.lora_dropout["default"](given)) * scaling)
    base = layer.base_layer(x)
    return base + delta.to(base.dtype)


def _is_large(layer: Any) -> bool:
    """Return whether a LoRA costs as much as its layer, so that adding it to the weight is cheaper.

    A separate LoRA takes 3 r (in + out) products per token, forward and backward, in seven small steps; added to the
    weight, the gradient of the weight takes in * out in one step. In 16 bit the sum would be rounded, so this is for
    fp32 only.
    """
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    (rank, wide), tall = a.shape, b.shape[0]
    plain = isinstance(layer.lora_dropout["default"], nn.Identity) and a.dtype == torch.float32
    return plain and _STEPS * rank * (wide + tall) >= wide * tall


@torch.no_grad()
def _weight(base: Any) -> Tensor:
    """Return the weight of a frozen linear layer, (out, in), in fp32."""
    # FSDP replaces the weight by a plain tensor; bitsandbytes keeps the quantization state on the layer too.
    state = getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)
    return base.weight.float() if state is None else unpacked(base.weight.data, state)


def compile_layers(language_model: Any) -> None:
    """Compile the norms of a LLaMA or Mistral, and the gates of its MLPs, for packs of any length."""
    for layer in language_model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = partial(compiled(type(norm).forward), norm)
        layer.mlp.forward = partial(_mlp, layer.mlp)


def gated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """Compute what a LLaMA's MLP does between its matrix products."""
    return act(gate) * up


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """Compute an MLP with the compiled gate, (..., D) -> (..., D)."""
    out: Tensor = mlp.down_proj(compiled(gated)(mlp.act_fn, mlp.gate_proj(x), mlp.up_proj(x)))
    return out


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled by torch.compile, compiled once for all layers."""
    return torch.compile(function, dynamic=True)
