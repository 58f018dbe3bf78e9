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

    def attend(start: int, end: int, seen: Sequence[tuple[int, int]], mask: Tensor | None) -> Tensor:
        keys, values = (torch.cat([x[:, :, a:b] for a, b in seen], dim=2) for x in (key, value))
        return scaled_dot_product_attention(
            query[:, :, start:end],
            keys,
            values,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )

    out = []
    for group in row_groups:
        start, edge = group.start, group.start + group.prefix
        if group.prefix:
            out.append(attend(start, edge, [(start, edge)], None))
        for length in group.branches:
            end = edge + length
            if group.prefix:
                seen = [(start, start + group.prefix), (edge, end)]
                out.append(attend(edge, end, seen, _corner(length, group.prefix, query.device)))
            else:
                out.append(attend(edge, end, [(edge, end)], None))
            edge = end
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
