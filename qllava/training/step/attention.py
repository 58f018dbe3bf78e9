"""Attention inside a pack: a token attends, causally, to the prefix of its group and to its own branch only.

For a prefix of 3 and branches of 2 and 1:

             prefix   a a   b
    prefix   x . .
             x x .
             x x x
    a        x x x    x .
             x x x    x x
    b        x x x          x

Three kernels compute it, and none computes what a token may not attend to:

    groups   torch's scaled dot product attention, group by group: the prefix causally, then each branch against
             prefix and branch. Runs everywhere
    varlen   torch's variable-length flash attention: the same pieces in one call, the keys of each branch
             follow a copy of its prefix's keys, causal from the bottom right. CUDA, 16 bit
    flex     torch's FlexAttention, compiled, with a block mask. CUDA

`training/step/kernels.py` chooses one. Attention by packs is registered with transformers under its own name and used
inside `looking_at`; outside, the model's usual attention is unchanged.

B = 1, H heads, S tokens, D width of a head, L learned tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from qllava.data.packing import Group

NAME = "qllava_records"
Kernel = Literal["groups", "varlen", "flex"]


@dataclass
class Sight:
    """Which token attends to which in a pack, in the forms the kernels need; computed once for all layers."""

    groups: Sequence[Group]
    """Layout of the pack."""
    learned: Tensor
    """(L,) positions that predict a learned token, in order, on the pack's device."""
    counts: Sequence[int]
    """Number of those positions in each branch, branch by branch."""
    kernel: Kernel = "groups"
    """Kernel that computes the attention."""

    @cached_property
    def branches(self) -> list[tuple[int, int, int]]:
        """(prefix, start, length) of every branch: tokens of its group's prefix, its own first position, its tokens."""
        found = []
        for group in self.groups:
            start = group.start + group.prefix
            for length in group.branches:
                found.append((group.prefix, start, length))
                start += length
        return found

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each prefix and each branch, in the order of the pack."""
        return [length for group in self.groups for length in (group.prefix, *group.branches) if length]

    @cached_property
    def corners(self) -> list[Tensor | None]:
        """Masks of the branches, (length, prefix + length): the prefix and earlier own tokens; None: causal."""
        device = self.learned.device
        return [
            torch.ones(length, prefix + length, dtype=torch.bool, device=device).tril(prefix) if prefix else None
            for prefix, _, length in self.branches
        ]

    @cached_property
    def learned_corners(self) -> list[Tensor]:
        """Masks of the learned positions of each branch, (count, prefix + length)."""
        of_branches = zip(self.learned.split(list(self.counts)), self.branches, strict=True)
        return [
            torch.arange(prefix + length, device=self.learned.device) <= prefix + (places - start)[:, None]
            for places, (prefix, start, length) in of_branches
        ]

    @cached_property
    def copies(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Index of the pieces that `varlen` computes: each prefix, and each branch after a copy of its prefix.

        Returns:
            The token each key belongs to; the offsets of the pieces' queries and of their keys, (pieces + 1,) each; the
            numbers of queries and of keys of the longest piece.
        """
        seen, queries, keys = [], [0], [0]
        for group in self.groups:
            start = group.start
            for prefix, length in ((0, group.prefix), *((group.prefix, length) for length in group.branches)):
                if length:
                    seen += [torch.arange(group.start, group.start + prefix), torch.arange(start, start + length)]
                    queries.append(length)
                    keys.append(prefix + length)
                start += length
        which, query_ends, key_ends = torch.cat(seen), torch.tensor(queries), torch.tensor(keys)
        ends = [x.cumsum(0).int() for x in (query_ends, key_ends)]
        which, *ends = (x.to(self.learned.device, non_blocking=True) for x in (which, *ends))
        return which, ends[0], ends[1], max(queries), max(keys)

    @cached_property
    def block_mask(self) -> BlockMask:
        """Mask of the pack in FlexAttention's form."""
        groups, branches = [], []  # of each token; a prefix is branch 0 of its group
        for number, group in enumerate(self.groups):
            lengths = torch.tensor([group.prefix, *group.branches])
            branches.append(torch.arange(len(lengths)).repeat_interleave(lengths))
            groups.append(torch.full((int(lengths.sum()),), number))
        group_of, branch_of = (torch.cat(x).to(self.learned.device, non_blocking=True) for x in (groups, branches))

        def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own = (branch_of[k] == 0) | (branch_of[k] == branch_of[q])
            return (group_of[q] == group_of[k]) & own & (k <= q)

        length, device = len(group_of), str(group_of.device)
        return create_block_mask(seen, B=None, H=None, Q_LEN=length, KV_LEN=length, device=device)


def pack_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sight: Sight,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one pack, with the signature that transformers expects.

    Args:
        module: The attention layer; not used.
        query: (1, H, S, D), or (1, H, L, D) for the learned positions alone.
        key: (1, H_kv, S, D).
        value: (1, H_kv, S, D).
        attention_mask: Must be None; `sight` holds the mask.
        sight: Which token attends to which.
        scaling: Factor of the scores; None for 1 / sqrt(D).
        dropout: Probability of dropout on the attention weights.

    Returns:
        (1, S or L, H, D), and None in the place of attention weights.
    """
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError("a pack is one sequence without an attention mask")
    if query.shape[2] != key.shape[2] or sight.kernel == "groups" or dropout:
        out = by_groups(query, key, value, sight, scaling, dropout)
    else:
        out = (varlen if sight.kernel == "varlen" else flex)(query, key, value, sight, scaling)
    return out.transpose(1, 2), None


def by_groups(
    query: Tensor, key: Tensor, value: Tensor, sight: Sight, scaling: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Compute attention with the kernel `groups`, (1, H, S or L, D) -> the same shape."""
    few = query.shape[2] != key.shape[2]
    # Split once: slicing piece by piece would fill a whole pack with zeros for each slice in the backward pass.
    keys, values = (iter(x.split(sight.lengths, dim=2)) for x in (key, value))
    queries = iter(query.split(list(sight.counts) if few else sight.lengths, dim=2))
    masks = iter(sight.learned_corners if few else sight.corners)
    attend = partial(
        scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    out = []
    for group in sight.groups:
        if group.prefix:
            first_key, first_value = next(keys), next(values)
            if not few:  # no position in a prefix predicts a learned token
                out.append(attend(next(queries), first_key, first_value, is_causal=True))
        for _ in group.branches:
            own_query, own_key, own_value, mask = next(queries), next(keys), next(values), next(masks)
            if group.prefix:
                own_key, own_value = torch.cat([first_key, own_key], dim=2), torch.cat([first_value, own_value], dim=2)
            out.append(attend(own_query, own_key, own_value, attn_mask=mask, is_causal=mask is None))
    return torch.cat(out, dim=2)


def varlen(query: Tensor, key: Tensor, value: Tensor, sight: Sight, scaling: float | None = None) -> Tensor:
    """Compute attention with the kernel `varlen`, (1, H, S, D) -> the same shape."""
    from torch.nn.attention.varlen import varlen_attn  # without CUDA it may be missing

    which, query_ends, key_ends, most_queries, most_keys = sight.copies
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    out: Any = varlen_attn(
        queries,
        keys[which],
        values[which],
        query_ends,
        key_ends,
        most_queries,
        most_keys,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    turned: Tensor = out.transpose(0, 1)[None]
    return turned


def flex(query: Tensor, key: Tensor, value: Tensor, sight: Sight, scaling: float | None = None) -> Tensor:
    """Compute attention with the kernel `flex`, (1, H, S, D) -> the same shape."""
    out: Tensor = _compiled()(
        query, key, value, block_mask=sight.block_mask, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return out


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


AttentionInterface.register(NAME, pack_attention)


@contextmanager
def looking_at(language_model: Any) -> Iterator[None]:
    """Use attention by packs in a language model; forward and backward passes inside need a `Sight`."""
    config = language_model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
