"""Images in every form that a caller of the Python API may have, and one sentence for every other."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qllava.config import InputError
from qllava.inference import Chat
from qllava.inference.given import as_list, open_given
from tests.tiny_models import make_image, make_tiny_model, make_tiny_processor
from tests.tiny_runs import refusal

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def png() -> bytes:
    written = io.BytesIO()
    Image.fromarray(PIXELS).save(written, "png")
    return written.getvalue()


def written_to_the_end() -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "png")
    return file


@pytest.mark.parametrize("form", ["path", "text", "bytes", "bytearray", "memoryview", "file", "PIL", "array", "floats"])
def test_all_forms_are_the_same_image(form: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    forms: dict[str, Any] = {
        "path": path,
        "text": str(path),
        "bytes": png(),
        "bytearray": bytearray(png()),
        "memoryview": memoryview(png()),
        "file": written_to_the_end(),
        "PIL": Image.fromarray(PIXELS),
        "array": PIXELS,
        "floats": PIXELS.astype(np.float32) / 255,
    }
    opened = open_given(forms[form])
    assert opened.mode == "RGB" and np.array_equal(np.asarray(opened), PIXELS)
    (alone,) = as_list(forms[form])
    assert alone is forms[form]


def test_an_open_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    with (tmp_path / "a.png").open("rb") as file:
        assert np.array_equal(np.asarray(open_given(file)), PIXELS)


@pytest.mark.parametrize("shape", [(24, 40), (24, 40, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64])
def test_grey(shape: tuple[int, ...], dtype: Any) -> None:
    grey = PIXELS[:, :, 0].reshape(shape)
    given = grey if dtype == np.uint8 else (grey / 255).astype(dtype)
    opened = np.asarray(open_given(given)).astype(int)
    assert opened.shape == (24, 40, 3)
    assert np.abs(opened - grey.reshape(24, 40, 1)).max() <= (1 if dtype == np.float16 else 0)


def test_what_is_transparent_becomes_white() -> None:
    rgba = np.dstack([PIXELS, np.zeros((24, 40), np.uint8)])
    assert (np.asarray(open_given(rgba)) == 255).all()


def test_a_view_that_is_not_contiguous() -> None:
    assert np.array_equal(np.asarray(open_given(PIXELS[::-1, ::2])), PIXELS[::-1, ::2])


REFUSED: dict[str, tuple[Any, str]] = {
    "channels first": (PIXELS.transpose(2, 0, 1), r"\(3, 24, 40\).*transpose\(1, 2, 0\)"),
    "a batch": (PIXELS[None], r"the shape \(1, 24, 40, 3\); expected \(height, width\)"),
    "two channels": (PIXELS[:, :, :2], r"\(24, 40, 2\)"),
    "nothing in it": (PIXELS[:0], r"\(0, 40, 3\)"),
    "one row": (PIXELS[0, :, 0], r"\(40,\)"),
    "floats up to 255": (PIXELS.astype(np.float32), "from 0 to 255; expected 0 to 1"),
    "negative": (PIXELS / 255 - 0.5, "from -0.5 to 0.5; expected 0 to 1"),
    "no number": (np.full((4, 4), np.nan), "values from nan"),
    "16 bits": (PIXELS.astype(np.uint16), "type uint16; expected uint8"),
    "integers": (PIXELS.astype(np.int64), "type int64; expected uint8"),
    "a mask": (PIXELS[:, :, 0] > 9, "type bool; expected uint8"),
    "a tensor": (torch.zeros(3, 4, 4), r"type Tensor .*permute\(1, 2, 0\)"),
    "a number": (7, "type int cannot be read: give a path"),
    "a dictionary": ({"image": "a.png"}, "type dict cannot be read"),
    "lists of lists": ([[1, 2]], "type list cannot be read"),
    "no bytes": (b"", "bytes is empty"),
    "bytes of a text": (b"no image", "8 bytes cannot be used: this is not an image that can be read"),
    "bytes that are cut off": (png()[:-400], "cannot be used"),
    "a file of text": (io.StringIO("no image"), "Open the file as binary"),
    "an address": ("https://example.org/a.png", "is a URL. Download the image"),
    "a missing file": ("nowhere/a.png", "nowhere/a.png"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_anything_else_is_one_sentence(what: str) -> None:
    given, said = REFUSED[what]
    with pytest.raises(InputError, match=said) as error:
        for image in as_list(given):
            open_given(image)
    refusal(error.value)


def test_a_model_is_asked_about_each_form() -> None:
    processor = make_tiny_processor()
    chat = Chat(make_tiny_model(processor), processor, "memory")
    red, blue = make_image("red"), make_image("blue")

    def answer(images: Any) -> str:
        return chat.answer(images, "What?", max_new_tokens=6)

    assert answer(np.asarray(red)) == answer(red) == answer([np.asarray(red)])
    assert answer([red, np.asarray(blue)]) == answer([red, blue])
    assert "".join(chat.stream(np.asarray(red), "What?", max_new_tokens=6)).strip() == answer(red)
    assert chat.answer_batch([(np.asarray(red), "What?")], max_new_tokens=6) == [answer(red)]
    with pytest.raises(InputError, match="uint16"):
        answer(np.zeros((4, 4), np.uint16))
