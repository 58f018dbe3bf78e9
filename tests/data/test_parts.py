"""Content parts that name their image: paths, file:// and data URLs, in the forms of chat APIs and of transformers."""

from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qllava.data.formats import Example, read_examples
from qllava.data.problems import RecordError

ANSWER = {"role": "assistant", "content": "Yes."}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLLAVA_CACHE", str(tmp_path / "cache"))
    for name in ("a.png", "b.png"):
        Image.effect_noise((6, 4), 90).save(tmp_path / name)
    return tmp_path


def read(folder: Path, content: Any, **more: Any) -> Example:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": content}, ANSWER], **more}))
    return read_examples(path)[0]


def data_url(folder: Path, name: str = "a.png", head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode((folder / name).read_bytes()).decode()


def test_every_form_of_an_image_part_shows_the_same_image(folder: Path) -> None:
    plain, url = base64.b64encode((folder / "a.png").read_bytes()).decode(), data_url(folder)
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": (folder / "a.png").as_uri()},
        {"type": "image", "image": url},
        {"type": "image", "base64": plain},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": plain}},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"image": "a.png"},
    ]
    for part in parts:
        example = read(folder, [part, {"type": "text", "text": "Is it?"}])
        assert [p.read_bytes() for p in example.images] == [(folder / "a.png").read_bytes()], part
        assert example.conversation.turns[0].content == "<image>\nIs it?"
        assert example.unread == ()


def test_named_images_stay_in_their_order(folder: Path) -> None:
    example = read(folder, [
        {"type": "text", "text": "Is"}, {"type": "image", "image": "b.png"},
        {"type": "text", "text": "darker than"}, {"type": "image", "image": "a.png"}, {"type": "text", "text": "?"},
    ])  # fmt: skip
    assert [p.name for p in example.images] == ["b.png", "a.png"]
    assert example.conversation.turns[0].content == "Is <image> darker than <image>?"


def test_records_name_images_by_the_same_forms(folder: Path) -> None:
    for name in ("a.png", data_url(folder), (folder / "a.png").as_uri()):
        example = read(folder, "<image>Is it?", images=[name])
        assert [p.read_bytes() for p in example.images] == [(folder / "a.png").read_bytes()]


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ([{"type": "image_url", "image_url": {"url": "https://host/a.png"}}], {}, "is an address; download it"),
        ([{"type": "image", "image": "gone.png"}], {}, "'gone.png' is not in the image folder"),
        ([{"type": "image", "url": "file:///etc/hostname"}], {}, "is outside the image folder"),
        ([{"type": "image", "image": "data:image/png;base64,%%"}], {}, "the data URL 'data:image/png;base64,%%'"),
        ([{"type": "image", "image": 3}], {}, "must be a file name"),
        ([{"type": "image", "image": "a.png"}], {"images": ["a.png"]}, "under images and in the content parts"),
        ([{"type": "image", "image": "a.png"}, {"type": "image"}], {}, "some image parts name their image and some"),
        ([{"type": "image"}], {}, "hold 1 <image>, the example names 0 images"),
        ([{"type": "video", "video": "a.mp4"}], {}, "turn 1 has a part that is neither"),
        (["What?"], {}, "turn 1 has a part that is neither"),
    ],
)
def test_what_cannot_be_shown_is_said(folder: Path, content: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read(folder, content, **more)


@pytest.mark.parametrize(("stored", "named"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_that_look_alike_are_found(folder: Path, stored: str, named: str) -> None:
    """MacOS stores "é" as two characters; a file of names that was written elsewhere has one."""
    (folder / unicodedata.normalize(stored, "é")).mkdir()
    path = folder / unicodedata.normalize(stored, "é") / unicodedata.normalize(stored, "für.png")
    Image.new("RGB", (4, 4)).save(path)
    example = read(folder, "<image>Is it?", image=unicodedata.normalize(named, "é/für.png"))
    assert example.images == (path,)
    with pytest.raises(RecordError, match="is not in the image folder"):
        read(folder, "<image>Is it?", image=unicodedata.normalize(named, "é/fur.png"))
