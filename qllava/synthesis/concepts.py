"""The concept-balanced choice of captions: fewer of what is everywhere, all of what is rare.

As the LLaVA paper made 595K captions out of CC3M (Liu et al. 2023, "Visual Instruction Tuning", appendix). A concept is
a noun phrase. Its count is the number of captions that contain it, however often each of them does.

    count < min_count                        it is passed over
    min_count <= count <= max_per_concept    all of its captions are kept
    count > max_per_concept                  max_per_concept of its captions, drawn from all of them at random, are kept

A caption is kept when at least one concept keeps it. The paper goes from the rarest concept up to the most frequent.
Here the order has no influence, and concepts of the same count need no rule: a draw is made from all captions of its
concept, whether rarer concepts have kept some of them already or not (the paper: "a subset of size 100 out of all its
captions"), and depends on nothing but these captions, the seed and the concept. So of a frequent concept more than
`max_per_concept` captions are kept: those that it drew, and those that other concepts in them brought along.

The draw: `random.Random("SEED CONCEPT")` gives a number to each caption of the concept, in the order of the file, and
the smallest numbers win. `random()` is the one method of that class whose numbers Python promises not to change.
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
    """Which captions contain which concept.

        C captions, P distinct concepts, N pairs of a concept and a caption that contains it

    captions: C.
    concepts: P names, in the order in which they first occurred.
    starts: (P + 1) where in `holders` the captions of each concept begin.
    holders: (N) captions from 0 to C - 1; those of concept p are holders[starts[p]:starts[p + 1]], ascending.
    """

    captions: int
    concepts: tuple[str, ...]
    starts: NDArray[np.int64]
    holders: NDArray[np.int32]

    @property
    def counts(self) -> NDArray[np.int64]:
        """(P) the number of captions that contain each concept."""
        return np.diff(self.starts)

    def counts_among(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(P) the same among the captions that `kept` (C) marks."""
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
    """(C) which captions are kept; what that means is said above."""
    counts = index.counts
    kept = np.zeros(index.captions, dtype=np.bool_)
    whole = (min_count <= counts) & (counts <= max_per_concept)
    kept[index.holders[np.repeat(whole, counts)]] = True
    for concept in np.flatnonzero((min_count <= counts) & (counts > max_per_concept)):
        captions = index.holders[index.starts[concept] : index.starts[concept + 1]].tolist()
        kept[draw(captions, max_per_concept, f"{seed} {index.concepts[concept]}")] = True
    return kept


def draw(captions: list[int], count: int, key: str) -> list[int]:
    """`count` of the captions at random, by nothing but the key and their order."""
    number = random.Random(key).random
    return heapq.nsmallest(count, captions, key=lambda _: number())
