"""What a check keeps is used again exactly while it still holds; where it cannot be kept, nothing half is left."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qllava.config import InputError
from qllava.data import check as module
from qllava.data import decoded
from qllava.data.problems import Place
from qllava.data.verdict import Verdict
from tests.data.checking import LIST, PRETTY, SAID, SEEN, encoder, images_in, learned, llava, looked_at, said, saved


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLLAVA_CACHE", str(tmp_path / "cache"))
    return images_in(tmp_path / "data")


@pytest.fixture
def train(folder: Path) -> Path:
    path = folder / "train.json"
    path.write_text(LIST, encoding="utf-8")
    return path


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read and decoded from now on, by name."""
    done: list[str] = []
    read, decode = module.read_records, decoded.open_image

    def reads(path: Path, *args: Any) -> Any:
        done.append(path.name)
        return read(path, *args)

    def decodes(path: Path) -> Any:
        done.append(path.name)
        return decode(path)

    monkeypatch.setattr(module, "read_records", reads)
    monkeypatch.setattr(decoded, "open_image", decodes)
    return done


def again(path: Path, work: list[str], *args: Any, **more: Any) -> list[str]:
    """Check once more; what was done for it."""
    work.clear()
    looked_at(path, *args, **more)
    return sorted(work)


ALL = ["blue.png", "red.png", "train.json"]


def test_a_second_check_reads_nothing(train: Path, work: list[str]) -> None:
    first = looked_at(train)
    assert sorted(work) == ALL
    assert again(train, work) == []
    second = looked_at(train)
    assert (second.folder, second.summary, learned(second)) == (first.folder, first.summary, learned(first))


def test_rows_that_cannot_be_used_are_found_again_without_reading(train: Path, work: list[str]) -> None:
    train.write_text(json.dumps([{"id": "bad", "question": "a", "answer": ""}]), encoding="utf-8")
    first = looked_at(train)
    assert first.summary.errors == 1
    assert again(train, work) == []
    assert list(looked_at(train).problems()) == list(first.problems())


def test_text_that_changed_is_read_again_and_its_images_are_known(train: Path, work: list[str]) -> None:
    looked_at(train)
    train.write_text(PRETTY.replace("bus", "car"), encoding="utf-8")
    assert again(train, work) == ["train.json"]
    train.write_text(LIST, encoding="utf-8")
    assert again(train, work) == []


@pytest.mark.parametrize("more", [{"max_length": 99}, {"too_long": "drop"}], ids=str)
def test_another_encoder_reads_again(train: Path, work: list[str], more: dict[str, Any]) -> None:
    looked_at(train)
    assert again(train, work, encoder(**more)) == ["train.json"]
    assert again(train, work, encoder()) == []


def test_a_file_that_was_only_touched_is_not_read(train: Path, work: list[str]) -> None:
    looked_at(train)
    os.utime(train, (1, 1))
    assert again(train, work) == []


def test_an_image_that_changed_is_decoded_again_alone(train: Path, work: list[str]) -> None:
    looked_at(train)
    Image.new("RGB", (9, 9)).save(train.parent / "red.png")
    assert again(train, work) == ["red.png"]
    assert again(train, work) == []


def test_an_image_that_broke_is_found_though_the_rows_are_known(train: Path, work: list[str]) -> None:
    looked_at(train)
    whole = (train.parent / "red.png").read_bytes()
    (train.parent / "red.png").write_bytes(b"no image")
    for _ in range(2):  # and found again by the next check
        assert again(train, work) == ["red.png"]
        (problem,) = looked_at(train).problems()
        assert (problem.kind, problem.id, problem.place) == ("image broken", "one", Place(str(train), line=1, row=1))
        assert not Verdict.over([looked_at(train)]).ok
    assert looked_at(train, images=False).summary.errors == 0
    (train.parent / "red.png").write_bytes(whole)
    assert again(train, work) == ["red.png"]
    assert Verdict.over([looked_at(train)]).ok


def test_an_image_that_went_missing_is_found(train: Path, work: list[str]) -> None:
    looked_at(train)
    (train.parent / "blue.png").unlink()
    assert again(train, work) == ["blue.png"]
    name = train.parent / "blue.png"
    (told,) = said(looked_at(train))
    assert told.startswith(
        f"train.json, example 3, id three: {name}: the image does not exist; check the name, and the fo"
    )
    assert "(--image-folder; image_folder in a recipe)" in told


def test_a_missing_image_that_was_added_makes_it_sound(train: Path, work: list[str]) -> None:
    (train.parent / "blue.png").rename(train.parent / "away.png")
    assert looked_at(train).summary.errors == 1
    (train.parent / "away.png").rename(train.parent / "blue.png")
    assert again(train, work) == ["blue.png", "train.json"]
    assert Verdict.over([looked_at(train)]).ok
    assert again(train, work) == []


def test_a_missing_file_that_was_added_is_read(train: Path) -> None:
    train.unlink()
    assert looked_at(train).summary.errors == 1
    train.write_text(LIST, encoding="utf-8")
    assert Verdict.over([looked_at(train)]).ok


def test_images_are_known_from_another_file_of_their_folder(train: Path, work: list[str]) -> None:
    looked_at(train)
    other = train.parent / "test.json"
    other.write_text(json.dumps([llava(SEEN, SAID, image=name) for name in ("red.png", "deep/green.png")]))
    assert again(other, work) == ["green.png", "test.json"]
    assert again(train, work) == again(other, work) == []


def test_without_images_none_is_decoded(train: Path, work: list[str]) -> None:
    (train.parent / "red.png").write_bytes(b"no image")
    assert again(train, work, images=False) == ["train.json"]
    assert again(train, work) == ["blue.png", "red.png"]


def test_the_images_in_the_folder_of_a_data_set_are_no_part_of_it(folder: Path, work: list[str]) -> None:
    saved(folder / "set")
    looked_at(folder / "set")
    Image.new("RGB", (5, 5)).save(folder / "set" / "red.png")
    assert again(folder / "set", work) == ["red.png"]


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_what_a_loss_of_power_left_empty_is_made_again(train: Path, work: list[str], content: str) -> None:
    kept = looked_at(train).folder
    (known,) = kept.parent.glob("images-*.json")
    known.write_text(content if content != "[]" else "{}")
    (kept / "rows.json").write_text(content if content != "[]" else "{")
    assert again(train, work) == ALL
    assert again(train, work) == []


def test_nothing_else_is_left_behind(train: Path) -> None:
    kept = looked_at(train).folder
    assert sorted(path.name for path in kept.iterdir()) == [
        "images.jsonl",
        "rows.json",
        "rows.jsonl",
        "samples.arrow",
    ]
    assert [path for path in kept.parent.iterdir() if ".partial" in path.name] == []


# --- where it cannot be kept ---


def test_a_cache_that_is_no_folder(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (train.parent / "file").write_text("mine")
    monkeypatch.setenv("QLLAVA_CACHE", str(train.parent / "file"))
    with pytest.raises(InputError) as error:
        looked_at(train)
    assert str(error.value) == (
        f"The results of the check of {train} cannot be written to {train.parent}/file/checked (Not a directory); "
        "free disk space there, or set $QLLAVA_CACHE to another folder."
    )
    assert (train.parent / "file").read_text() == "mine"


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Call it, and no file may grow over so many bytes any more: what a full disk does, without being root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size if size else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1, 100, 2000, 3000])
def test_a_full_disk(train: Path, small_files: Callable[[int], None], work: list[str], size: int) -> None:
    small_files(size)
    try:
        with pytest.raises(InputError) as error:
            looked_at(train)
    finally:
        small_files(0)  # before pytest writes its next dot
    assert str(error.value).startswith(
        f"The results of the check of {train} cannot be written to {train.parents[1]}/cache/checked ("
    )
    assert str(error.value).endswith("); free disk space there, or set $QLLAVA_CACHE to another folder.")
    assert list((train.parents[1] / "cache" / "checked").glob("*")) == []
    assert again(train, work) == ALL


def test_a_disk_that_is_full_for_the_images(train: Path, small_files: Callable[[int], None], work: list[str]) -> None:
    """The examples are kept already; a list of images is none that half of it was written of."""
    looked_at(train, images=False)
    small_files(50)
    try:
        with pytest.raises(InputError, match="cannot be written to"):
            looked_at(train)
    finally:
        small_files(0)
    assert again(train, work) == ["blue.png", "red.png"]
    assert again(train, work) == []
