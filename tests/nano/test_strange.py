"""Images without a scene: of nano's size, each another, the same for the same seed."""

from __future__ import annotations

import random

import numpy as np

from qllava.nano import strange
from qllava.nano.scenes import SIZE


def test_they_follow_from_their_seed_and_differ() -> None:
    drawn = [strange.draw(random.Random(seed)) for seed in range(60)]
    assert all((image.size, image.mode) == ((SIZE, SIZE), "RGB") for image in drawn)
    assert len({image.tobytes() for image in drawn}) == 60
    assert strange.draw(random.Random(7)).tobytes() == drawn[7].tobytes()


def test_every_kind_has_contrast() -> None:
    for draw in strange._DRAW:
        assert np.asarray(draw(random.Random(3))).std() > 4, draw.__name__
