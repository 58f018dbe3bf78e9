"""What decoding the images of a data set shows: one colour, the same image twice; and that it is remembered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qllava.conversation import CHATML
from qllava.data import decoded
from qllava.data.check import check
from qllava.data.encode import Encoder
from tests.tiny_models import IMAGE_LAYOUT, make_tiny_tokenizer


@pytest.fixture
def encoder() -> Encoder:
    tokenizer = make_tiny_tokenizer()
    return Encoder(tokenizer, CHATML, tokenizer.convert_tokens_to_ids("<image>"), IMAGE_LAYOUT)


def noted(folder: Path, encoder: Encoder, *names: str) -> list[str]:
    path = folder / "rows.json"
    rows = [{"id": f"of {name}", "image": name, "question": f"{name}?", "answer": "Yes."} for name in names]
    path.write_text(json.dumps(rows))
    checked = check(path, None, encoder, progress=False)
    assert checked.summary.failing == 0
    return [str(problem) for problem in checked.problems()]


def test_one_colour_and_the_same_image_are_noted(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLLAVA_CACHE", str(tmp_path / "cache"))
    drawn = Image.effect_noise((30, 20), 90).convert("RGB")
    drawn.save(tmp_path / "a.png")
    drawn.save(tmp_path / "b.bmp")
    drawn.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "c.png")
    white = Image.new("LA", (30, 20), (255, 0))  # white on nothing
    white.putpixel((3, 3), (255, 255))
    white.save(tmp_path / "d.png")
    Image.new("RGB", (30, 20), (1, 2, 3)).save(tmp_path / "e.png")
    names = ("a.png", "b.bmp", "c.png", "d.png", "e.png")
    first = noted(tmp_path, encoder, *names)
    assert first == [
        f"rows.json, example 2, id of b.bmp: {tmp_path}/b.bmp: it is the same image as {tmp_path}/a.png; "
        "if this is intended, use one of the two file names in all records.",
        f"rows.json, example 4, id of d.png: {tmp_path}/d.png: every pixel has the colour #ffffff; "
        "open the image: its content may be lost.",
        f"rows.json, example 5, id of e.png: {tmp_path}/e.png: every pixel has the colour #010203; "
        "open the image: its content may be lost.",
    ]
    monkeypatch.setattr(decoded, "_decode", lambda name: pytest.fail(f"{name} is decoded again"))
    assert noted(tmp_path, encoder, *names) == first
    assert noted(tmp_path, encoder, "b.bmp", "c.png") == []


def test_images_that_differ_in_one_pixel_are_not_the_same(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large white page with a word on it, for one: most pixels are alike."""
    monkeypatch.setenv("QLLAVA_CACHE", str(tmp_path / "cache"))
    page = Image.new("RGB", (400, 300), "white")
    page.putpixel((1, 1), (0, 0, 0))
    for n, name in enumerate(("a.png", "b.png", "c.png")):
        page.putpixel((201 + (n > 0), 101), (0, 0, 0))
        page.save(tmp_path / name)
    found = noted(tmp_path, encoder, "a.png", "b.png", "c.png")
    assert len(found) == 1 and f"{tmp_path}/c.png: it is the same image as {tmp_path}/b.png" in found[0]
    Image.new("RGB", (400, 300), "white").save(tmp_path / "d.png")
    monkeypatch.setattr(decoded, "_hash_of_all", lambda name: pytest.fail(f"{name} is hashed again"))
    assert noted(tmp_path, encoder, "a.png", "b.png", "c.png") == found
    assert "every pixel has the colour #ffffff" in noted(tmp_path, encoder, "d.png")[0]
