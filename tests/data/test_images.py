"""Pictures come out as Pillow's RGB, upright; broken ones are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from qllava.config import InputError
from qllava.data.images import open_image

NOISE = np.random.default_rng(0).integers(0, 256, (13, 21, 4), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_pillows_rgb(mode: str, tmp_path: Path) -> None:
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray(NOISE[..., 0].astype({"I;16": "uint16", "I": "int32", "F": "float32"}[mode]))
    else:
        image = Image.fromarray(NOISE).convert("RGB" if mode == "CMYK" else "RGBA").convert(mode)
    assert image.mode == mode
    image.save(path := tmp_path / "picture.tiff")
    with Image.open(path) as stored:
        expected = np.asarray(stored.convert("RGB"))
    opened = open_image(path)
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(NOISE[..., :3]).save(path := tmp_path / "photo.png", exif=exif)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    assert np.array_equal(np.asarray(open_image(path)), expected)
    assert expected.shape == ((21, 13, 3) if orientation > 4 else (13, 21, 3))


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    frames[0].save(path := tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp"])
def test_a_cut_off_file_is_refused(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(NOISE[..., :3]).resize((90, 90)).save(path := tmp_path / f"photo{suffix}")
    open_image(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=rf"photo\{suffix}: "):
        open_image(path)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_picture_is_refused(content: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(InputError, match="photo.png: "):
        open_image(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.png: there is no such picture"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(InputError, match="cannot be decoded"):
        open_image(tmp_path)


def test_photographs(shared_data: Path) -> None:
    sizes = {path.name: open_image(path).size for path in sorted((shared_data / "photos").glob("*.jpg"))}
    assert sorted(sizes.values()) == [(570, 380), (1000, 667)]
