"""Contexts of nano and of files, and the folder of their images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qllava.config import InputError
from qllava.data.contexts import read_contexts
from qllava.nano.dataset import TRAIN_IMAGES, scene_of
from qllava.nano.scenes import SIZE
from qllava.synthesis.sources import contexts_of, image_folder


class TestNano:
    def test_scenes_are_those_of_its_training_images(self) -> None:
        contexts = contexts_of("nano:30")
        assert [one.image for one in contexts[:2]] == ["images/train-000000.png", "images/train-000001.png"]
        for one in contexts:
            shapes = scene_of(one.id).shapes
            assert [box.category for box in one.boxes] == [f"{s.size} {s.colour} {s.form}" for s in shapes]
            assert one.boxes[0].bbox == pytest.approx([value / SIZE for value in shapes[0].box])
            assert len(one.captions) == 5 and one.complete
        assert contexts == contexts_of("nano:30")

    @pytest.mark.parametrize("source", ["nano:0", "nano:x", "nano:", f"nano:{TRAIN_IMAGES + 1}", "nano:-1"])
    def test_a_number_that_is_none(self, source: str) -> None:
        with pytest.raises(InputError, match=rf"must be from 1 to {TRAIN_IMAGES:,} \(nano.s training scenes\)"):
            contexts_of(source)


def test_images_lie_beside_the_file(tmp_path: Path) -> None:
    assert image_folder(tmp_path / "contexts.jsonl") == tmp_path
    assert image_folder(tmp_path) == tmp_path


def test_another_source_is_a_file(tmp_path: Path) -> None:
    row = {"id": "1", "image": "1.jpg", "captions": ["A cat."], "boxes": []}
    (tmp_path / "contexts.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert contexts_of(str(tmp_path / "contexts.jsonl")) == read_contexts(tmp_path / "contexts.jsonl")
