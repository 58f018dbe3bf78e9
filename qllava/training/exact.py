"""The forward pass of a row: the same loss as that of its samples, each by itself, for less.

    pictures --tower (no gradient), once each--> --projector--> features --gathered--> at the image tokens
    tokens --embeddings--> + features --language model, by rows--> hidden --those that predict--> head --> loss

What is left out changes nothing: tokens that predict nothing have no logits, a picture is looked at once however many
samples show it, and the tower stops at the layer that is used.

S tokens, P image tokens of a row, I its pictures, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qllava.data.encode import IGNORE_INDEX
from qllava.data.packing import Group


def row_loss(
    model: Any,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    shift_labels: Tensor,
    features: Tensor,
    groups: Sequence[Group],
    pixel_values: Tensor | None = None,
) -> Tensor:
    """The sum of the losses of a row's learned tokens.

    model: a LlavaForConditionalGeneration whose language model is `looking_at` rows.
    input_ids, position_ids, shift_labels: (S,).
    features: (P,) indices into the features of all pictures, (I * tokens_per_image, D).
    pixel_values: (I, 3, H, W); None for a row without pictures.
    """
    embeddings = model.model.language_model.get_input_embeddings()(input_ids)
    if pixel_values is not None:
        seen = image_features(model, pixel_values)
        places = (input_ids == model.config.image_token_index).nonzero()[:, 0]
        embeddings = embeddings.index_put((places,), seen[features].to(embeddings.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeddings[None],
        position_ids=position_ids[None],
        attention_mask=None,
        use_cache=False,
        row_groups=tuple(groups),
    ).last_hidden_state[0]
    learned = shift_labels != IGNORE_INDEX
    logits = model.lm_head(hidden[learned])
    return cross_entropy(logits.float(), shift_labels[learned], reduction="sum")


def image_features(model: Any, pixel_values: Tensor) -> Tensor:
    """(I, 3, H, W) -> (I * tokens_per_image, D): the tower outside the graph, then the projector."""
    tower = model.model.vision_tower
    with torch.no_grad():
        out = tower(pixel_values.to(tower.dtype), output_hidden_states=True)
    chosen = out.hidden_states[model.config.vision_feature_layer]
    if model.config.vision_feature_select_strategy == "default":
        chosen = chosen[:, 1:]
    seen: Tensor = model.model.multi_modal_projector(chosen)
    return seen.flatten(0, 1)
