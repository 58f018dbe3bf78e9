"""The concept-balanced choice against a slow, plain reading of its definition, and what the definition implies."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.filter_million import make, plainly
from qllava.synthesis.concepts import draw, index_phrases, select
from qllava.synthesis.phrases import simple_phrases

CAPTIONS = st.lists(st.lists(st.sampled_from("abcdefg"), max_size=4), max_size=40)
THRESHOLD = st.integers(1, 6)


def kept(captions: list[list[str]], min_count: int = 3, max_per_concept: int = 100, seed: int = 0) -> set[int]:
    """Which captions are kept, by number."""
    index = index_phrases(captions)
    chosen = select(index, min_count=min_count, max_per_concept=max_per_concept, seed=seed)
    assert chosen.shape == (len(captions),)
    return set(np.flatnonzero(chosen).tolist())


@pytest.mark.parametrize(("exponent", "seed"), [(1.0, 0), (1.3, 7)])
def test_twenty_thousand_of_a_power_law_are_chosen_as_defined(exponent: float, seed: int) -> None:
    texts, truth = make(20_000, 20_000, exponent)
    counts = Counter(name for held in truth for name in set(held))
    assert {0, 1, 2} == {(n >= 3) + (n > 100) for n in counts.values()}, "all three cases occur"
    chosen = kept([simple_phrases(text) for text in texts], seed=seed)
    assert chosen == plainly(truth, 3, 100, seed)
    assert 0 < len(chosen) < len(texts)


@example([["a"]] * 5 + [["b"]] * 5, 1, 2, 0)
@example([], 1, 1, 0)
@given(CAPTIONS, THRESHOLD, THRESHOLD, st.integers(-5, 5))
def test_any_captions_are_chosen_as_defined(captions: list[list[str]], least: int, most: int, seed: int) -> None:
    assert kept(captions, least, most, seed) == plainly(captions, least, most, seed)


@given(CAPTIONS, THRESHOLD, THRESHOLD)
def test_what_the_definition_promises(captions: list[list[str]], least: int, most: int) -> None:
    chosen = kept(captions, least, most)
    holders = {name: {n for n, held in enumerate(captions) if name in held} for name in "abcdefg"}
    for held in holders.values():
        if len(held) >= least:
            assert len(held & chosen) >= min(len(held), most)
            assert len(held) > most or held <= chosen
    counted = set().union(*(held for held in holders.values() if len(held) >= least))
    assert chosen <= counted, "a caption of rare concepts only is never kept"


@given(CAPTIONS, THRESHOLD, THRESHOLD)
def test_order_and_repetition_inside_a_caption_change_nothing(captions: list[list[str]], least: int, most: int) -> None:
    mixed = [list(reversed(held)) + held for held in captions]
    assert kept(mixed, least, most) == kept(captions, least, most)


@given(CAPTIONS, THRESHOLD, st.text(alphabet="xyz", min_size=1))
def test_other_concepts_do_not_change_a_draw(captions: list[list[str]], most: int, other: str) -> None:
    """What a concept keeps does not depend on those beside it, so that neither order nor ties matter."""
    more = [[*held, other] if number % 3 == 0 else held for number, held in enumerate(captions)]
    assert kept(captions, 1, most) <= kept(more, 1, most)


def test_thresholds_are_inclusive() -> None:
    captions = [["two"]] * 2 + [["three"]] * 3 + [["four"]] * 4 + [["five"]] * 5
    chosen = kept(captions, 3, 4)
    assert not chosen & {0, 1} and {2, 3, 4, 5, 6, 7, 8} <= chosen
    assert len(chosen & {9, 10, 11, 12, 13}) == 4


def test_a_phrase_that_a_caption_repeats_counts_once() -> None:
    assert kept([["a", "a", "a"], ["a"]], 3) == set()
    assert index_phrases([["a", "b", "a"], ["b"]]).counts.tolist() == [1, 2]


def test_a_draw_is_from_all_captions_whatever_rarer_concepts_kept() -> None:
    captions = [["everywhere", "rare"]] * 3 + [["everywhere"]] * 500
    alone = kept([["everywhere"]] * 503)
    assert len(alone) == 100
    assert kept(captions) == alone | {0, 1, 2}


def test_the_seed_decides_and_nothing_else() -> None:
    captions = [["a"]] * 1000
    assert kept(captions, seed=1) == kept(captions, seed=1)
    assert kept(captions, seed=1) != kept(captions, seed=2)
    assert kept([["a"]] * 1000 + [["b"]] * 1000) != {*kept(captions), *(1000 + n for n in kept(captions))}, (
        "each concept has draws of its own"
    )
    assert draw(list(range(10, 20)), 3, "0 a") == [12, 13, 19], "pinned: the same in every version of Python"


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_a_draw_is_fair(seed: int) -> None:
    """Half of what is drawn lies in the first half; 20 to 80 of 100 are six standard deviations to either side."""
    first = sum(caption < 500 for caption in draw(list(range(1000)), 100, f"{seed} x"))
    assert 20 <= first <= 80


def test_the_index_is_what_it_says() -> None:
    index = index_phrases([["b", "a"], [], ["a", "c", "a"], ["a"]])
    assert index.captions == 4 and index.concepts == ("b", "a", "c")
    parts = np.split(index.holders, index.starts[1:-1])
    assert [part.tolist() for part in parts] == [[0], [0, 2, 3], [2]]
    assert index.counts_among(np.array([True, True, False, True])).tolist() == [1, 2, 0]
    empty = index_phrases([[], []])
    assert empty.captions == 2 and empty.counts.tolist() == [] and empty.counts_among(np.ones(2, bool)).tolist() == []
