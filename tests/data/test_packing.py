"""Packs and the order of samples: what is shared, where it stands, and that an epoch shows every sample once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qllava.data.encode import IGNORE_INDEX
from qllava.data.packing import Group, best_fit, lay_out, packs_of, shared_prefix, steps_of

P = 9
N = IGNORE_INDEX


def sample(id: str, ids: list[int], labels: list[int], *images: str) -> dict[str, Any]:
    """Images take the same number of tokens each."""
    image_tokens = [ids.count(P) // len(images)] * len(images) if images else []
    return {"id": id, "input_ids": ids, "labels": labels, "image_files": list(images), "image_tokens": image_tokens}


def test_the_pack_that_the_docstring_draws() -> None:
    pack = lay_out(
        [
            sample("a", [1, P, P, P, P, 2, 20, 21, 22, 3], [N] * 8 + [22, 3], "x.png"),
            sample("t", [1, 40, 3], [N, 40, 3]),
            sample("b", [1, P, P, P, P, 2, 30, 21, 32, 3], [N] * 8 + [32, 3], "x.png"),
        ],
        P,
    )
    assert pack.input_ids.tolist() == [1, P, P, P, P, 2, 20, 21, 22, 3, 30, 21, 32, 3, 1, 40, 3]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 6, 7, 8, 9, 0, 1, 2]
    assert pack.shift_labels.tolist() == [N] * 6 + [N, 22, 3, N] + [N, 32, 3, N] + [40, 3, N]
    assert pack.groups == (Group(0, 6, (4, 4)), Group(14, 0, (3,)))
    assert (pack.groups[0].end, pack.groups[1].end) == (14, 17)
    assert (pack.features.tolist(), pack.images, pack.ids) == ([0, 1, 2, 3], ("x.png",), ("a", "b", "t"))


def test_captions_repeat_the_token_before_them_and_its_feature() -> None:
    captions = [
        sample(str(n), [1, P, P, P, P, word, 2], [N] * 5 + [word, 2], "x.png") for n, word in enumerate((50, 60, 70))
    ]
    pack = lay_out(captions, P)
    assert pack.groups == (Group(0, 4, (3, 3, 3)),)
    assert pack.input_ids.tolist() == [1, P, P, P] + [P, 50, 2] + [P, 60, 2] + [P, 70, 2]
    assert pack.features.tolist() == [0, 1, 2, 3, 3, 3]
    assert pack.shift_labels.tolist() == [N] * 4 + [50, 2, N] + [60, 2, N] + [70, 2, N]


def test_images_may_take_unequal_numbers_of_tokens() -> None:
    """Features are counted image by image, so the second image begins where the first one ends."""
    tokens = {"x.png": 3, "y.png": 1, "z.png": 2}

    def shown(id: str, *images: str) -> dict[str, Any]:
        counts = [tokens[name] for name in images]
        ids = [1, *[token for count in counts for token in [*[P] * count, 5]], 7, 8]
        learned = {"labels": [N] * (len(ids) - 1) + [8], "image_files": list(images), "image_tokens": counts}
        return {"id": id, "input_ids": ids, **learned}

    pack = lay_out([shown("a", "x.png", "y.png"), shown("b", "z.png"), shown("c", "y.png", "x.png")], P)
    assert pack.images == ("x.png", "y.png", "z.png")
    assert pack.features.tolist() == [0, 1, 2, 3] + [4, 5] + [3, 0, 1, 2]
    assert pack.input_ids[pack.image_places].tolist() == [P] * 10


def questions(count: int, image: str, length: int = 4) -> list[dict[str, Any]]:
    """Samples of 6 shared tokens and `length` of their own."""
    start = [1, P, P, P, P, 2]
    return [
        sample(f"{image}{n}", start + [20 + n] * length, [N] * 8 + [20 + n] * (length - 2), image) for n in range(count)
    ]


def test_packs_are_no_longer_than_asked_for() -> None:
    samples = [*questions(5, "x.png"), *questions(2, "y.png"), sample("t", [1, 40, 3], [N, 40, 3])]
    whole = packs_of(samples, P, tokens_per_pack=None)
    assert [len(pack.input_ids) for pack in whole] == [26 + 14 + 3]
    packs = packs_of(samples, P, tokens_per_pack=18)
    # x: 6 + 3 x 4, and 6 + 2 x 4 beside nothing; y: 6 + 2 x 4, with the text of 3 tokens
    assert sorted(len(pack.input_ids) for pack in packs) == [14, 17, 18]
    assert sorted(id for pack in packs for id in pack.ids) == sorted(s["id"] for s in samples)


def test_a_sample_that_is_longer_is_a_pack_by_itself() -> None:
    samples = [*questions(1, "x.png", 30), *questions(2, "y.png")]
    assert [pack.ids for pack in packs_of(samples, P, tokens_per_pack=20)] == [("x.png0",), ("y.png0", "y.png1")]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 40))
def test_bins_hold_everything_once_and_no_more_than_fits(sizes: list[int], capacity: int) -> None:
    bins = best_fit(sizes, capacity)
    assert sorted(k for some in bins for k in some) == list(range(len(sizes)))
    assert all(sum(sizes[k] for k in some) <= capacity or len(some) == 1 for some in bins)
    # Two bins that could be one would not be a best fit.
    loads = [sum(sizes[k] for k in some) for some in bins]
    assert sum(2 * load <= capacity for load in loads) <= 1


def test_an_image_of_two_samples_that_cannot_share_is_looked_at_once() -> None:
    packs = [
        sample("a", [1, P, P, 20, 3], [N] * 4 + [3], "x.png"),
        sample("b", [7, P, P, 20, 3], [N] * 4 + [3], "x.png"),
        sample("c", [1, P, P, P, P, 3], [N] * 5 + [3], "y.png", "x.png"),
    ]
    pack = lay_out(packs, P)
    assert pack.images == ("x.png", "y.png")
    assert pack.features.tolist() == [0, 1, 0, 1, 2, 3, 0, 1]
    assert [group.prefix for group in pack.groups] == [0, 0, 0]


@pytest.mark.parametrize(
    ("ids", "learned", "prefix"),
    [
        ([[1, P, P, 5, 6], [1, P, P, 5, 7]], [4, 4], 3),  # 5 predicts what is learned
        ([[1, P, P, 5, 6], [1, P, P, 8, 6]], [4, 4], 3),
        ([[1, P, P, 5, 6, 7], [1, P, P, 5, 6, 8]], [5, 5], 4),
        ([[1, P, P, 6], [1, P, P, 7]], [3, 3], 2),  # the last image token predicts
        ([[1, P, P, 6], [2, P, P, 6]], [3, 3], 0),
        ([[1, 5, P, P, 6], [1, 4, P, P, 6]], [4, 4], 0),
        ([[1, P, P, 5], [1, P, P]], [3, 3], 2),  # the second teaches nothing
        ([[1, P, P, 5, 6]], [4], 0),
    ],
)
def test_what_is_shared(ids: list[list[int]], learned: list[int], prefix: int) -> None:
    samples = [(one, [N if k < at else t for k, t in enumerate(one)]) for one, at in zip(ids, learned, strict=True)]
    found = shared_prefix(samples, P)
    assert found == prefix


HASHES = st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 5, 6]), min_size=1, max_size=120)


@settings(deadline=None, max_examples=80)
@given(HASHES, st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_an_epoch_shows_every_sample_once_in_steps_of_the_size_asked_for(
    hashes: list[int], size: int, epoch: int, share: bool
) -> None:
    images = np.array(hashes)
    steps = list(steps_of(images, size, seed=1, epoch=epoch, share=share))
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(hashes)))
    assert all(len(step) == size for step in steps[:-1]) and 0 < len(steps[-1]) <= size
    again = steps_of(images, size, seed=1, epoch=epoch, share=share)
    assert all(np.array_equal(a, b) for a, b in zip(steps, again, strict=True))


def test_samples_of_an_image_come_together_and_epochs_differ() -> None:
    images = np.repeat(np.arange(1, 101), 3)
    steps = list(steps_of(images, 6, seed=0, epoch=0))
    whole = [sorted(np.unique(images[step], return_counts=True)[1].tolist()) for step in steps]
    assert whole.count([3, 3]) == len(steps)
    other = list(steps_of(images, 6, seed=0, epoch=1))
    assert not all(np.array_equal(a, b) for a, b in zip(steps, other, strict=True))
    alone = list(steps_of(images, 6, seed=0, epoch=0, share=False))
    assert np.mean([len(np.unique(images[step])) for step in alone]) > 5


def test_other_names_for_the_images_change_nothing() -> None:
    """The hashes are of paths: data that lies elsewhere is trained on in the same order."""
    images = np.array([5, 9, 0, 5, 2, 9, 0, 7, 2, 2])
    renamed = np.array([0, 6, 8, 1, 3])[np.searchsorted([0, 2, 5, 7, 9], images)]
    here, there = (list(steps_of(of, 4, seed=3, epoch=1)) for of in (images, renamed))
    assert len(np.unique(renamed)) == 5 and all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_group_that_is_larger_than_a_step_is_cut() -> None:
    steps = list(steps_of(np.full(10, 7), 4, seed=0, epoch=0))
    assert [len(step) for step in steps] == [4, 4, 2]
