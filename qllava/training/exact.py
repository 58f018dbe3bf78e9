"""The forward pass of a row: the same loss as that of its samples, each by itself, for less.

    pictures --tower (no gradient), once each--> --projector--> features --gathered--> at the image tokens
    tokens --embeddings--> + features --language model, by rows--> hidden --those that predict--> head --> log_probs

What is left out changes nothing: tokens that predict nothing have no logits, and a picture is looked at once however
many samples show it.

S tokens, P image tokens of a row, I its pictures, L its learned tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from qllava.data.encode import IGNORE_INDEX
from qllava.data.packing import Group


@dataclass
class RowOutput(ModelOutput):
    """What TRL makes its loss and its figures of, for the learned tokens alone; (L,) each."""

    log_probs: Tensor | None = None
    """Of the token that was to come; these have gradients."""
    label_mask: Tensor | None = None
    """True everywhere: only learned tokens are here."""
    entropy: Tensor | None = None
    """Of what was predicted, in nats."""
    is_top1: Tensor | None = None
    """Whether the token that was to come was the likeliest."""


def teach_rows(model: Any) -> None:
    """Let a LlavaForConditionalGeneration's forward take rows too: a call with `row_groups` is one of a row.

    It stands on the instance, so that a call goes through whatever wraps the model (peft, accelerate, DDP).
    """
    plain = model.forward

    def forward(*args: Any, row_groups: Sequence[Group] | None = None, **kwargs: Any) -> Any:
        if row_groups is None:
            return plain(*args, **kwargs)
        return row_forward(model, row_groups=row_groups, **kwargs)

    model.forward = forward


def row_forward(
    model: Any,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    shift_labels: Tensor,
    features: Tensor,
    row_groups: Sequence[Group],
    pixel_values: Tensor | None = None,
    **_: Any,
) -> RowOutput:
    """What the model says to the learned tokens of a row.

    model: a LlavaForConditionalGeneration whose language model is `looking_at` rows.
    input_ids, position_ids, shift_labels: (1, S).
    features: (P,) indices into the features of all pictures, (I * tokens_per_image, D).
    pixel_values: (I, 3, H, W); None for a row without pictures.
    """
    embeddings = model.model.language_model.get_input_embeddings()(input_ids[0])
    if pixel_values is not None:
        seen = image_features(model, pixel_values)
        places = (input_ids[0] == model.config.image_token_index).nonzero()[:, 0]
        embeddings = embeddings.index_put((places,), seen[features].to(embeddings.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeddings[None],
        position_ids=position_ids,
        attention_mask=None,
        use_cache=False,
        row_groups=tuple(row_groups),
    ).last_hidden_state[0]
    learned = shift_labels[0] != IGNORE_INDEX
    logits = model.lm_head(hidden[learned]).float()
    labels = shift_labels[0][learned]
    likely = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(likely.exp() * likely).sum(-1)
        is_top1 = likely.argmax(-1) == labels
    log_probs = likely.gather(-1, labels[:, None])[:, 0]
    return RowOutput(log_probs, torch.ones_like(is_top1), entropy, is_top1)


def image_features(model: Any, pixel_values: Tensor) -> Tensor:
    """(I, 3, H, W) -> (I * tokens_per_image, D): the tower outside the graph, then the projector."""
    with torch.no_grad():
        out = model.model.vision_tower(pixel_values, output_hidden_states=True)
    chosen = out.hidden_states[model.config.vision_feature_layer]
    if model.config.vision_feature_select_strategy == "default":
        chosen = chosen[:, 1:]
    seen: Tensor = model.model.multi_modal_projector(chosen)
    return seen.flatten(0, 1)
