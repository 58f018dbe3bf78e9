"""The drawn world: scenes follow from their seed, hold what they promise, and an image shows what its scene says."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from qllava.nano.scenes import (
    CELL,
    COLOURS,
    FORMS,
    PLACES,
    SIZE,
    SIZES,
    UNSEEN_PAIRS,
    Scene,
    Shape,
    Split,
    render,
    sample_scene,
    split_of,
)

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
IMAGES = """
import hashlib, random
from qllava.nano.scenes import render, sample_scene
digest = hashlib.sha256()
for seed in range(20):
    digest.update(render(sample_scene(random.Random(f"image-{seed}"))).tobytes())
print(digest.hexdigest())
"""


def some_scenes(count: int, split: Split = "train", *, unseen: bool = False) -> list[Scene]:
    return [sample_scene(random.Random(f"{split}-{unseen}-{seed}"), split, unseen=unseen) for seed in range(count)]


def every_kind(count: int) -> list[Scene]:
    return [scene for split in SPLITS for unseen in (False, True) for scene in some_scenes(count, split, unseen=unseen)]


def pairs_of(scene: Scene) -> list[tuple[str, str]]:
    return [(s.colour, s.form) for s in scene.shapes]


def painted(scene: Scene, index: int) -> np.ndarray:
    """Which pixels one shape covers: those that change when it changes colour. (SIZE, SIZE) booleans."""
    shape = scene.shapes[index]
    other = replace(shape, colour="blue" if shape.colour != "blue" else "yellow")
    shapes = (*scene.shapes[:index], other, *scene.shapes[index + 1 :])
    before, after = (np.asarray(render(s), dtype=int) for s in (scene, replace(scene, shapes=shapes)))
    return np.abs(before - after).max(axis=2) > 0


def test_a_scene_follows_from_its_seed() -> None:
    assert some_scenes(50) == some_scenes(50)
    assert len({repr(s) for s in some_scenes(50)}) == 50


def test_the_scenes_are_those_that_the_weights_were_trained_on() -> None:
    """Whoever changes these numbers raises dataset.VERSION and builds nano's weights again."""
    scenes = [sample_scene(random.Random(f"tower-{seed}")) for seed in range(500)]
    assert zlib.crc32(repr(scenes).encode()) == 196011746


def test_an_image_is_the_same_in_every_process() -> None:
    digest = hashlib.sha256()
    for seed in range(20):
        digest.update(render(sample_scene(random.Random(f"image-{seed}"))).tobytes())
    other = subprocess.run(
        [sys.executable, "-c", IMAGES],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert other.stdout.strip() == digest.hexdigest()


def test_an_image_is_drawn_twice_alike() -> None:
    for scene in some_scenes(20):
        image = render(scene)
        assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))
        assert image.tobytes() == render(scene).tobytes()


def test_a_scene_holds_two_to_five_shapes_and_a_place_holds_one() -> None:
    counts: Counter[int] = Counter()
    for scene in every_kind(200):
        cells = [s.cell for s in scene.shapes]
        assert cells == sorted(set(cells)), "shapes stand in reading order, one per place"
        counts[len(cells)] += 1
    assert set(counts) == {2, 3, 4, 5}
    assert min(counts.values()) > 0.2 * sum(counts.values())


def test_colour_and_form_name_one_shape() -> None:
    for scene in every_kind(200):
        pairs = pairs_of(scene)
        assert len(set(pairs)) == len(pairs)


def test_shapes_share_a_colour_or_a_form_often_enough_that_one_word_does_not_do() -> None:
    shared = sum(
        len({c for c, _ in pairs}) < len(pairs) or len({f for _, f in pairs}) < len(pairs)
        for pairs in map(pairs_of, some_scenes(500))
    )
    assert shared > 250


@pytest.mark.parametrize("split", SPLITS)
def test_unseen_pairs_are_only_where_they_are_asked_for(split: Split) -> None:
    assert not any(UNSEEN_PAIRS & set(pairs_of(s)) for s in some_scenes(1000, split))
    asked = some_scenes(400, split, unseen=True)
    assert all(UNSEEN_PAIRS & set(pairs_of(s)) for s in asked)
    assert {p for s in asked for p in pairs_of(s)} >= UNSEEN_PAIRS


def test_colours_and_forms_of_unseen_pairs_are_seen_apart() -> None:
    seen = {pair for scene in some_scenes(1000) for pair in pairs_of(scene)}
    assert seen == {(c, f) for c in COLOURS for f in FORMS} - UNSEEN_PAIRS


def test_splits_share_no_layout() -> None:
    layouts = {
        split: {
            tuple((s.size, s.colour, s.form, s.cell) for s in scene.shapes)
            for unseen in (False, True)
            for scene in some_scenes(600, split, unseen=unseen)
        }
        for split in SPLITS
    }
    assert not layouts["train"] & layouts["validation"]
    assert not layouts["train"] & layouts["test"]
    assert not layouts["validation"] & layouts["test"]


def test_the_split_depends_on_the_layout_alone() -> None:
    for split in SPLITS:
        for scene in some_scenes(100, split):
            moved = tuple(replace(s, x=s.x + 1, y=s.y - 1, angle=0.0) for s in scene.shapes)
            assert split_of(scene.shapes) == split_of(moved) == split


def test_the_split_of_a_layout_never_changes() -> None:
    """By hand: a hash that differs between processes (Python's own does) would let the splits meet."""
    one, two = Shape("star", "red", "small", 0, 16, 16, 0), Shape("ring", "blue", "large", 4, 48, 48, 0)
    layout = "small red star 0|large blue ring 4"
    share = zlib.crc32(layout.encode()) % 20
    assert split_of((one, two)) == ("test" if share < 2 else "validation" if share < 3 else "train")


def test_a_tenth_of_all_layouts_is_for_the_test() -> None:
    rng = random.Random(0)
    shares = Counter(split_of(tuple(_any_shape(rng, cell) for cell in (0, 4, 8))) for _ in range(4000))
    assert 0.08 < shares["test"] / 4000 < 0.12
    assert 0.03 < shares["validation"] / 4000 < 0.07


def _any_shape(rng: random.Random, cell: int) -> Shape:
    return Shape(rng.choice(FORMS), rng.choice(list(COLOURS)), rng.choice(list(SIZES)), cell, 0, 0, 0)


def test_a_box_lies_inside_its_place_and_a_place_has_its_name() -> None:
    for scene in every_kind(100):
        for shape in scene.shapes:
            x1, y1, x2, y2 = shape.box
            assert x2 - x1 == pytest.approx(SIZES[shape.size])
            assert y2 - y1 == pytest.approx(SIZES[shape.size])
            assert 0 <= shape.column * CELL <= x1 < x2 <= (shape.column + 1) * CELL <= SIZE
            assert 0 <= shape.row * CELL <= y1 < y2 <= (shape.row + 1) * CELL <= SIZE
            rows, columns = ("top", "", "bottom"), ("left", "", "right")
            assert shape.place == (f"{rows[shape.row]} {columns[shape.column]}".strip() or "centre")
            assert shape.place == PLACES[shape.cell]


def test_a_shape_is_painted_where_its_box_says_and_nowhere_else() -> None:
    """Three pixels of grace: a star's tips reach over its box, a turned triangle does not fill it."""
    for scene in some_scenes(40):
        for index, shape in enumerate(scene.shapes):
            ys, xs = np.nonzero(painted(scene, index))
            x1, y1, x2, y2 = shape.box
            extent = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert extent == pytest.approx((x1, y1, x2, y2), abs=3 if shape.size != "large" else 5)
            assert {(y // CELL, x // CELL) for y, x in zip(ys, xs, strict=True)} == {(shape.row, shape.column)}


def test_solid_forms_show_their_colour_at_their_centre_and_rings_are_open() -> None:
    forms: Counter[str] = Counter()
    for scene in every_kind(40):
        image = np.asarray(render(scene), dtype=float)
        for index, shape in enumerate(scene.shapes):
            x, y = int(shape.x), int(shape.y)
            if shape.form == "ring":
                assert not painted(scene, index)[y, x]
                continue
            found = image[y - 1 : y + 2, x - 1 : x + 2].mean(axis=(0, 1))
            nearest = min(COLOURS, key=lambda name: float(np.linalg.norm(found - COLOURS[name])))
            assert nearest == shape.colour, (shape, found)
            forms[shape.form] += 1
    assert set(forms) == set(FORMS) - {"ring"}


def test_larger_sizes_cover_more_and_forms_differ() -> None:
    areas = {
        (form, size): int(painted(Scene((Shape(form, "red", size, 4, 48, 48, 0),), 7), 0).sum())
        for form in FORMS
        for size in SIZES
    }
    for form in FORMS:
        assert areas[form, "small"] < areas[form, "medium"] < areas[form, "large"]
    masks = [painted(Scene((Shape(form, "red", "large", 4, 48, 48, 0),), 7), 0) for form in FORMS]
    for i, one in enumerate(masks):
        assert all((one != other).sum() > 60 for other in masks[:i])


def test_backgrounds_differ() -> None:
    shapes = some_scenes(1)[0].shapes
    assert len({render(Scene(shapes, seed)).tobytes() for seed in range(20)}) == 20
