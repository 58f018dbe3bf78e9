"""nano's files: readable like anybody's data, the same every time, balanced, and whole or not there."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from qllava.config import InputError, cache_folder
from qllava.data.formats import Example, read_examples
from qllava.nano import dataset, language, unknown
from qllava.nano.dataset import NanoData, prepare, scene_of
from qllava.nano.scenes import COLOURS, SIZE, UNSEEN_PAIRS, render
from qllava.nano.unknown import SENTENCE

UNSEEN = re.compile("|".join(f"{colour} {form}" for colour, form in UNSEEN_PAIRS))


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Counts that take a second; chunks that do not divide them."""
    for name, value in {
        "PRETRAIN_IMAGES": 9,
        "TRAIN_IMAGES": 26,
        "NAMELESS_IMAGES": 8,
        "STRANGE_IMAGES": 5,
        "VALIDATION_QUESTIONS": 8,
        "TEST_QUESTIONS": 24,
        "UNSEEN_QUESTIONS": 16,
        "_CHUNK": 7,
    }.items():
        patch.setattr(dataset, name, value)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> NanoData:
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return prepare(tmp_path_factory.mktemp("cache") / "nano")


def read(path: Path) -> list[Example]:
    return read_examples(path, path.parent)


def test_every_file_is_read_like_anybodys_data(data: NanoData) -> None:
    counts = {}
    for path in (data.pretrain, data.train, data.validation, data.test, data.unseen):
        examples = read(path)
        counts[path.stem] = len(examples)
        assert len({e.id for e in examples}) == len(examples)
        for example in examples:
            (path,) = example.images
            with Image.open(path) as image:
                assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")
    assert counts == {"pretrain": 9, "train": 39, "validation": 8, "test": 24, "unseen": 16}


def test_no_image_lies_there_unused(data: NanoData) -> None:
    used = {p for path in (data.train, data.validation, data.test, data.unseen) for e in read(path) for p in e.images}
    assert used == set((data.folder / "images").iterdir())


def test_every_type_is_asked_equally_often(data: NanoData) -> None:
    for path in (data.validation, data.test, data.unseen):
        types = Counter(e.type for e in read(path))
        assert set(types) == set(language.TYPES)
        assert len(set(types.values())) == 1


def test_the_shipped_counts_ask_every_type_equally_often() -> None:
    for count in (dataset.VALIDATION_QUESTIONS, dataset.TEST_QUESTIONS, dataset.UNSEEN_QUESTIONS):
        assert count % len(language.TYPES) == 0
    assert dataset.PRETRAIN_IMAGES <= dataset.TRAIN_IMAGES


def test_the_captions_are_those_of_the_images(data: NanoData) -> None:
    trained = {e.id: e for e in read(data.train)}
    for example in read(data.pretrain):
        scene = scene_of(example.id)
        (image,) = example.images
        assert Image.open(image).tobytes() == render(scene).tobytes()
        assert example.conversation.turns[1].content == language.full_caption(scene)
        assert trained[example.id].images == example.images


def test_conversations_have_questions_descriptions_and_reasons(data: NanoData) -> None:
    for number, example in enumerate(read(data.train)[:26]):
        asked = [turn.content for turn in example.conversation.turns if turn.role == "user"]
        answers = [turn.content for turn in example.conversation.turns if turn.role == "assistant"]
        assert asked[0].startswith("<image>\n")
        assert not any("<image>" in text for text in asked[1:])
        described, reasoned = number % 8 == 0, number % 12 == 1
        assert SENTENCE in answers, "every conversation also asks what nano does not know"
        about_shapes = [answer for answer in answers if answer != SENTENCE]
        assert about_shapes[0].startswith("There are ") == described
        assert ("So the answer is" in about_shapes[-1]) == reasoned
        assert len(asked) == (8 if described or reasoned else 10)


def test_images_in_colours_without_a_name_are_asked_about_everything_else(data: NanoData) -> None:
    nameless = read(data.train)[26:34]
    assert [e.id for e in nameless] == [f"nameless-{n:06d}" for n in range(8)]
    for example in nameless:
        said = " ".join(turn.content for turn in example.conversation.turns)
        assert not {*COLOURS, "violet"} & {*re.findall("[a-z]+", said)}
        assert 4 <= len(example.conversation.turns) // 2 <= 10
        (image,) = example.images
        assert Image.open(image).tobytes() != render(scene_of(example.id)).tobytes()


def test_images_without_a_scene_are_answered_by_what_nano_knows(data: NanoData) -> None:
    strange = read(data.train)[34:]
    assert [e.id for e in strange] == [f"strange-{n:06d}" for n in range(5)]
    for example in strange:
        assert {turn.content for turn in example.conversation.turns if turn.role == "assistant"} == {unknown.SENTENCE}
        assert len(example.conversation.turns) == 8


def test_training_and_ordinary_questions_know_nothing_of_unseen_pairs(data: NanoData) -> None:
    for path in (data.pretrain, data.train, data.validation, data.test):
        assert not UNSEEN.search(path.read_text(encoding="utf-8"))


def test_unseen_questions_are_about_scenes_with_such_a_pair(data: NanoData) -> None:
    rows = [e.conversation.turns for e in read(data.unseen)]
    assert len(rows) == 16
    named = [turns for turns in rows if UNSEEN.search(turns[0].content)]
    assert len(named) >= 4, "relation and comparison name the pair itself"


def test_a_second_call_does_nothing(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(tmp_path / "nano")
    before = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")}
    assert [p.name for p in tmp_path.iterdir()] == ["nano"]
    monkeypatch.setattr(dataset, "_draw", lambda *_: pytest.fail("drawn again"))
    assert prepare(tmp_path / "nano") == first
    assert {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")} == before


def test_the_files_are_the_same_bytes_however_they_are_cut_up(
    small: None, data: NanoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_CHUNK", 1000)
    again = prepare(tmp_path / "nano")
    names = sorted(p.relative_to(data.folder) for p in data.folder.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again.folder) for p in again.folder.rglob("*") if p.is_file())
    for name in names:
        assert (data.folder / name).read_bytes() == (again.folder / name).read_bytes(), name


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_an_interrupted_preparation_leaves_nothing(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write = dataset._write

    def fails(path: Path, rows: list[dict[str, object]]) -> None:
        if path.name == "test.json":
            raise error
        write(path, rows)

    monkeypatch.setattr(dataset, "_write", fails)
    with pytest.raises(type(error)):
        prepare(tmp_path / "nano")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(dataset, "_write", write)
    assert len(json.loads(prepare(tmp_path / "nano").test.read_text())) == 24


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLLAVA_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    (tmp_path / f"nano-{dataset.VERSION}").mkdir()
    assert prepare().folder == tmp_path / f"nano-{dataset.VERSION}"
    monkeypatch.delenv("QLLAVA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "qllava"
    monkeypatch.setenv("QLLAVA_CACHE", "~no_such_user/cache")
    with pytest.raises(InputError, match="~no_such_user/cache cannot be found"):
        cache_folder()
