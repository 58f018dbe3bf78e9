"""Concept-balanced choice of captions: fewer captions of frequent concepts, all captions of rare ones.

This is how the LLaVA paper reduced CC3M to 595K captions (Liu et al. 2023, "Visual Instruction Tuning", appendix). A
concept is a noun phrase. Its count is the number of captions that contain it; repetitions in a caption do not count.

    count < min_count                        the concept is ignored
    min_count <= count <= max_per_concept    all of its captions are kept
    count > max_per_concept                  max_per_concept of its captions, drawn at random from all, are kept

A caption is kept if at least one concept keeps it. The paper goes from the rarest concept to the most frequent one.
Here the order has no influence, and concepts with the same count need no rule: a draw is made from all captions of a
concept, even if rarer concepts have kept some of them already (the paper: "a subset of size 100 out of all its
captions"), and depends only on these captions, the seed and the concept. So more than `max_per_concept` captions of a
frequent concept may be kept: those drawn for it, and those kept by other concepts.

For a draw, `random.Random("SEED CONCEPT")` assigns a number to each caption of the concept, in the order of the file;
the captions with the smallest numbers are chosen. `random()` is the only method of that class whose numbers Python
promises not to change.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Index:
    """Index of the captions that contain each concept.

    Shapes: C captions, P distinct concepts, N pairs of a concept and a caption that contains it.
    """

    captions: int
    """Number of captions, C."""
    concepts: tuple[str, ...]
    """Names of the P concepts, in the order of their first occurrence."""
    starts: NDArray[np.int64]
    """(P + 1) positions in `holders` at which the captions of each concept begin."""
    holders: NDArray[np.int32]
    """(N) captions from 0 to C - 1; those of concept p are holders[starts[p]:starts[p + 1]], ascending."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of captions that contain each concept, shape (P)."""
        return np.diff(self.starts)

    def counts_among(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the number of captions marked by `kept` (C) that contain each concept, shape (P)."""
        passed = np.concatenate(([0], np.cumsum(kept[self.holders], dtype=np.int64)))
        return np.diff(passed[self.starts])


def index_phrases(phrases_of_captions: Iterable[Iterable[str]]) -> Index:
    """Number the phrases of captions, which are read once; a phrase counts once per caption."""
    numbers: dict[str, int] = {}
    pairs, lengths = array("i"), array("i")
    for phrases in phrases_of_captions:
        before = len(pairs)
        pairs.extend(numbers.setdefault(phrase, len(numbers)) for phrase in dict.fromkeys(phrases))
        lengths.append(len(pairs) - before)
    concepts = np.asarray(pairs, dtype=np.int32)
    captions = np.repeat(np.arange(len(lengths), dtype=np.int32), np.asarray(lengths, dtype=np.int32))
    counts = np.bincount(concepts, minlength=len(numbers))
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    # A stable sort keeps the captions of a concept in their order.
    return Index(len(lengths), tuple(numbers), starts, captions[np.argsort(concepts, kind="stable")])


def select(index: Index, *, min_count: int, max_per_concept: int, seed: int) -> NDArray[np.bool_]:
    """Return a mask (C) of the captions to keep, by the rules in the docstring of this module."""
    counts = index.counts
    kept = np.zeros(index.captions, dtype=np.bool_)
    whole = (min_count <= counts) & (counts <= max_per_concept)
    kept[index.holders[np.repeat(whole, counts)]] = True
    for concept in np.flatnonzero((min_count <= counts) & (counts > max_per_concept)):
        captions = index.holders[index.starts[concept] : index.starts[concept + 1]].tolist()
        kept[draw(captions, max_per_concept, f"{seed} {index.concepts[concept]}")] = True
    return kept


def draw(captions: list[int], count: int, key: str) -> list[int]:
    """Return `count` of the captions, drawn at random; the result depends only on the key and on their order."""
    number = random.Random(key).random
    return heapq.nsmallest(count, captions, key=lambda _: number())
