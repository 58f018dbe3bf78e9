"""Images of every mode come out as upright RGB with their content; corrupt ones are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from qllava.config import InputError
from qllava.data.images import as_rgb, open_image

NOISE = np.random.default_rng(0).integers(0, 256, (13, 21, 4), dtype=np.uint8)


RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))


def ramp(mode: str) -> Image.Image:
    """An image of this mode that goes from black (left) to white (right)."""
    match mode:
        case "I;16" | "I;16L" | "I;16B" | "I;16N":
            kind = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
            return Image.frombytes(mode, (64, 8), np.rint(RAMP * 65535).astype(kind).tobytes())
        case "I":
            return Image.fromarray(np.rint(RAMP * 65535).astype("int32"))
        case "F":
            return Image.fromarray(RAMP.astype("float32"))
    grey = Image.fromarray(np.rint(RAMP * 255).astype("uint8"))
    if mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        return ImageCms.applyTransform(grey.convert("RGB"), transform)
    if mode in ("P", "PA", "La", "RGBa"):  # from RGB, Pillow would dither into 216 colours
        return grey.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, "P")).convert(mode)
    return grey.convert("RGB").convert(mode)


@pytest.mark.parametrize("mode", sorted({*Image.MODES} - {"1"}))
def test_a_gradient_of_any_mode_that_pillow_has_stays_a_gradient(mode: str) -> None:
    opened = np.asarray(as_rgb(ramp(mode))).astype(int)
    assert opened.shape == (8, 64, 3)
    assert np.abs(opened - np.rint(RAMP * 255)[..., None]).max() <= 6  # Lab and YCbCr round


# What can be written to a file, and what it reads back as.
STORED = dict.fromkeys(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I", "I;16", "I;16B", "F"), "tiff")
STORED["YCbCr"] = "jpg"


@pytest.mark.parametrize("mode", STORED)
def test_a_gradient_in_a_file_stays_a_gradient(mode: str, tmp_path: Path) -> None:
    ramp(mode).save(path := tmp_path / f"ramp.{STORED[mode]}", **({"quality": 95} if STORED[mode] == "jpg" else {}))
    opened = open_image(path)
    assert opened.mode == "RGB"
    grey = np.asarray(opened).astype(int).mean(axis=(0, 2))
    if mode == "1":  # dithered: dark on the left, bright on the right
        assert grey[:16].mean() < 64 and grey[-16:].mean() > 192
    else:
        assert np.abs(grey - RAMP[0] * 255).max() <= 8


def test_16_bit_png_keeps_its_gradient_and_its_transparent_value(tmp_path: Path) -> None:
    ramp("I;16").save(path := tmp_path / "deep.png", transparency=0)
    grey = np.asarray(open_image(path)).astype(int)[0, :, 0]
    assert grey[0] == 255 and np.abs(grey[1:] - RAMP[0, 1:] * 255).max() <= 1


@pytest.mark.parametrize(
    ("high", "full"), [(200, 255), (255, 255), (1000, 1023), (3500, 4095), (16000, 16383), (40000, 65535)]
)
def test_deep_grey_is_scaled_by_the_depth_that_holds_it(high: int, full: int) -> None:
    values = np.rint(RAMP * high)
    for kind in ("uint16", "int32", "float32"):
        opened = np.asarray(as_rgb(Image.fromarray(values.astype(kind))))[..., 0]
        assert np.array_equal(opened, np.rint(values * (255 / full)).astype("uint8")), kind


@pytest.mark.parametrize("kind", ["int32", "float32"])
def test_grey_with_negative_values_goes_from_its_least_to_its_most(kind: str) -> None:
    opened = np.asarray(as_rgb(Image.fromarray((RAMP * 3000 - 1000).astype(kind))))[0, :, 0].astype(int)
    assert np.abs(opened - RAMP[0] * 255).max() <= 1


def test_a_tiff_in_which_zero_is_white_is_turned_round(tmp_path: Path) -> None:
    ramp("I;16").save(path := tmp_path / "film.tiff", tiffinfo={262: 0})
    grey = np.asarray(open_image(path)).astype(int)[0, :, 0]
    assert np.abs(grey - (1 - RAMP[0]) * 255).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_number_are_refused(value: float, tmp_path: Path) -> None:
    values = RAMP.astype("float32")
    values[3, 5] = value
    Image.fromarray(values).save(path := tmp_path / "height.tiff")
    with pytest.raises(InputError, match=r"height\.tiff: .* infinite or NaN"):
        open_image(path)


@pytest.mark.parametrize("stored", ["LA", "RGBA", "P", "1-transparent"])
def test_what_is_transparent_becomes_white(stored: str, tmp_path: Path) -> None:
    """Black text on nothing stays black text; Pillow alone would show nothing at all."""
    text = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    text.paste((0, 0, 0, 255), (10, 5, 30, 15))
    if stored == "P":
        drawn = Image.new("P", (40, 20), 0)
        drawn.putpalette([0, 0, 0, 0, 0, 0])
        drawn.paste(1, (10, 5, 30, 15))
        drawn.save(path := tmp_path / "text.png", transparency=0)
    elif stored == "1-transparent":
        drawn = Image.new("L", (40, 20), 7)
        drawn.paste(0, (10, 5, 30, 15))
        drawn.save(path := tmp_path / "text.png", transparency=7)
    else:
        text.convert(stored).save(path := tmp_path / "text.png")
    opened = np.asarray(open_image(path))
    assert (opened[5:15, 10:30] == 0).all()
    opened = opened.copy()
    opened[5:15, 10:30] = 255
    assert (opened == 255).all()


def test_half_transparent_is_half_white() -> None:
    assert as_rgb(Image.new("RGBA", (4, 4), (0, 0, 0, 51))).getpixel((1, 1)) == (204, 204, 204)


def test_images_after_public_reports(reports: Path) -> None:
    scan = np.asarray(open_image(reports / "scan_12bit.png"))
    assert {*scan.flat} == {round(500 * 255 / 4095), round(3500 * 255 / 4095)}
    a, b = (np.asarray(open_image(reports / f"transparent_{name}.png")) for name in "ab")
    assert a.min() < 10 and a.max() == 255 and b.min() < 10 and not np.array_equal(a, b)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation: int, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_image_is_refused(content: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(InputError, match="photo.png: "):
        open_image(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.png: the image does not exist"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(InputError, match="cannot be decoded"):
        open_image(tmp_path)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_drawn_photograph(progressive: bool, tmp_path: Path) -> None:
    """The two ways in which a JPEG is stored, in the sizes of photographs."""
    drawn = Image.fromarray(NOISE[..., :3]).resize((1000, 667))
    drawn.save(path := tmp_path / "photo.jpg", progressive=progressive, quality=95)
    opened = np.asarray(open_image(path)).astype(int)
    assert opened.shape == (667, 1000, 3) and np.abs(opened - np.asarray(drawn)).mean() < 3


def test_photographs(shared_data: Path) -> None:
    sizes = {path.name: open_image(path).size for path in sorted((shared_data / "photos").glob("*.jpg"))}
    assert sorted(sizes.values()) == [(570, 380), (1000, 667)]
