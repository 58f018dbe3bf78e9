"""Attention inside a row: a token sees the prefix of its own group and its own branch, causally, and nothing else.

Every group is computed by itself with torch's scaled dot product attention: the prefix causally; then each branch
against prefix and branch, where only its own corner is triangular. For a prefix of 3 and branches of 2 and 1:

             prefix   a a   b
    prefix   x . .
             x x .
             x x x
    a        x x x    x .
             x x x    x x
    b        x x x          x

so nothing is computed that the model may not see, whatever else stands in the row.

It is registered with transformers under a name of its own and used while `looking_at` a row; at all other times the
model attends as it did before.

B = 1, H heads, S tokens, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from qllava.data.packing import Group

NAME = "qllava_rows"


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_groups: Sequence[Group],
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one row, as transformers calls it: query (1, H, S, D), key and value (1, H_kv, S, D).

    Returns (1, S, H, D). `attention_mask` has to be None: the groups say who sees whom.
    """
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError("a row is one sequence without an attention mask")

    # Cut once: taking slices one by one would, on the way back, fill a whole row with zeros for each of them.
    lengths = [length for group in row_groups for length in (group.prefix, *group.branches) if length]
    queries, keys, values = (iter(x.split(lengths, dim=2)) for x in (query, key, value))
    attend = partial(
        scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    out = []
    for group in row_groups:
        if group.prefix:
            first_key, first_value = next(keys), next(values)
            out.append(attend(next(queries), first_key, first_value, is_causal=True))
        for length in group.branches:
            own_query, own_key, own_value = next(queries), next(keys), next(values)
            if not group.prefix:
                out.append(attend(own_query, own_key, own_value, is_causal=True))
                continue
            seen = torch.cat([first_key, own_key], dim=2), torch.cat([first_value, own_value], dim=2)
            out.append(attend(own_query, *seen, attn_mask=_corner(length, group.prefix, query.device)))
    return torch.cat(out, dim=2).transpose(1, 2), None


def _corner(length: int, prefix: int, device: torch.device) -> Tensor:
    """(length, prefix + length): all of the prefix, and the branch up to the token itself."""
    return torch.ones(length, prefix + length, dtype=torch.bool, device=device).tril(prefix)


AttentionInterface.register(NAME, row_attention)


@contextmanager
def looking_at(language_model: Any) -> Iterator[None]:
    """Let a language model attend by rows: forward passes inside, and their backward passes, need `row_groups`."""
    config = language_model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
