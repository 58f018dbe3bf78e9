"""Reading of images as upright RGB of 8 bits; corrupt images are refused.

`as_rgb` alone makes the pixels that a model sees from a decoded image, in training, chat, evaluation and demo:

    animation                   the first frame
    EXIF orientation            applied
    transparency                flattened on white, as a viewer shows it on a page, so that black text stays readable
    more than 8 bits of grey    scaled by the smallest usual depth (8, 10, 12, 14, 16 ... bits) that holds all values;
                                floating point up to 1 is 1 = white; with negative values, from the least to the most
    CMYK, YCbCr, HSV, LAB       converted

Pillow's `convert("RGB")` alone would clamp deep grey to white and paint transparent pixels in their hidden colour,
which is usually black. Padding and cropping are done by the image processor, which is saved with the model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from qllava.data.problems import Place, Problem, RecordError

# Maximum length of an image's longer side in pixels, and maximum ratio to the shorter side: image processors pad the
# image to a square, and need 1 GB for one of 12,000 x 60 pixels.
_LONGEST = 12_000
_SLENDER = 200
_TOO_LONG = f"more than {_LONGEST:,} pixels"

# Transformation for each value of the EXIF tag Orientation; 1 is upright. `ImageOps.exif_transpose` does the same, but
# it also rewrites the EXIF block, and fails there on images whose other tags are corrupt.
_ORIENTATION = 0x0112
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Grey of more than 8 bits. Cameras and scanners write their 10, 12 or 14 bits into files of 16.
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_PHOTOMETRIC = 262  # a TIFF's tag; 0 means that the value 0 is white
_DEPTHS = (8, 10, 12, 14, 16, 24, 32)


def open_image(path: Path) -> Image.Image:
    """Read and decode an image of any format that Pillow itself decodes, as upright RGB.

    Raises:
        RecordError: The file is missing, corrupt, truncated or not an image; the message names it.
    """
    try:
        with Image.open(path) as image:
            if image.format == "EPS":  # a program, which Pillow has Ghostscript run
                raise _broken(path, "EPS is a program and not an image, and it is not run", "convert it to PNG")
            _check_sides(path, *image.size)
            return as_rgb(image)
    except RecordError:
        raise
    except FileNotFoundError:
        raise _broken(path, "the image does not exist", "check the name") from None
    except UnidentifiedImageError:
        raise _broken(path, "this is not an image that can be read", "replace it, or remove its examples") from None
    except Image.DecompressionBombError:  # Pillow refuses what has more pixels than a square of this side
        raise _broken(path, f"a side of the image has {_TOO_LONG}", "resize or crop it") from None
    except Exception as error:  # Pillow's decoders raise many types for corrupt bytes (SyntaxError, struct.error)
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        reason = f"the image cannot be decoded ({said})"
        raise _broken(path, reason, "replace it, or remove its examples") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Return the image upright, in RGB of 8 bits, by the rules in the module's docstring.

    Raises:
        ValueError: Pixel values are not finite, or Pillow cannot convert the image's mode to RGB.
    """
    image.load()
    turn = _TO_UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    if image.mode in _DEEP:
        flat = _grey(image)
    elif image.has_transparency_data:
        over = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    elif image.mode == "LAB":
        flat = _from_lab(image)
    else:
        flat = image.convert("RGB")
    return flat if turn is None else flat.transpose(turn)


def _grey(image: Image.Image) -> Image.Image:
    """Convert grey of more than 8 bits to RGB; the value that a PNG declares transparent becomes white."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("some pixel values are infinite or NaN")
    low, high = float(values.min()), float(values.max())
    if low >= 0:
        low = 0.0
        floating = image.mode == "F"
        high = 1.0 if floating and high <= 1 else next((2.0**bits - 1 for bits in _DEPTHS if high < 2**bits), high)
    scaled = np.rint((values - low) * (255 / ((high - low) or 1.0)))
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # Pillow inverts it for 8 bits only
        scaled = 255 - scaled
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[values == transparent] = 255
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    """Convert CIE Lab to sRGB with Little CMS, because Pillow's `convert` does not support it."""
    transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    converted = ImageCms.applyTransform(image, transform)
    if converted is None:
        raise ValueError("Lab cannot be converted")
    return converted


def _check_sides(path: Path, width: int, height: int) -> None:
    longest, shortest = max(width, height), max(1, min(width, height))
    if longest > _LONGEST:
        raise _broken(path, f"a side of the image has {_TOO_LONG}", "resize or crop it")
    if longest > _SLENDER * shortest:
        slender = f"the image has {width} x {height} pixels, one side over {_SLENDER} times the other"
        raise _broken(path, slender, "crop it, or remove its examples")


def _broken(path: Path, problem: str, hint: str) -> RecordError:
    return RecordError(Problem("image broken", problem, hint, Place(str(path))))
