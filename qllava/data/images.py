"""Pictures: opened, turned upright, made RGB; what is broken is refused.

A picture is the first frame, upright, and then exactly what Pillow's `convert("RGB")` makes of it (a transparent
pixel keeps its colour; 16 bits are cut to 8), so that training, serving and other programs see the same pixels.
Padding and cropping belong to the image processor, which is saved with the model.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from qllava.data.problems import Place, Problem, RowError

# The longest side of a picture, and how many times it may be as long as the other one: image processors make a square
# of it, and need 1 GB for one of 12,000 x 60 pixels.
_LONGEST = 12_000
_SLENDER = 200
_TOO_LONG = f"more than {_LONGEST:,} pixels"

# What to do for each value of the EXIF tag Orientation; 1 is upright. `ImageOps.exif_transpose` does the same, but it
# also writes the EXIF block again, and fails there on pictures whose other tags are damaged.
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


def open_image(path: Path) -> Image.Image:
    """Read a picture of any kind that Pillow itself decodes, as upright RGB, completely decoded.

    Raises RowError, which names the file, when it is missing, broken, cut off or no picture.
    """
    try:
        with Image.open(path) as image:
            if image.format == "EPS":  # a program, which Pillow has Ghostscript run
                raise _broken(path, "EPS is no picture but a program, and is not run", "convert it to PNG")
            _check_sides(path, *image.size)
            image.load()
            turn = _TO_UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
            return (image if turn is None else image.transpose(turn)).convert("RGB")
    except RowError:
        raise
    except FileNotFoundError:
        raise _broken(path, "there is no such picture", "check the name and the image folder") from None
    except UnidentifiedImageError:
        raise _broken(path, "this is no picture that can be read", "replace it, or remove its rows") from None
    except Image.DecompressionBombError:  # Pillow refuses what has more pixels than a square of this side
        raise _broken(path, f"a side of the picture has {_TOO_LONG}", "make it smaller, or cut it") from None
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead to (SyntaxError, struct.error)
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        reason = f"the picture cannot be decoded ({said})"
        raise _broken(path, reason, "replace it, or remove its rows") from error


def _check_sides(path: Path, width: int, height: int) -> None:
    longest, shortest = max(width, height), max(1, min(width, height))
    if longest > _LONGEST:
        raise _broken(path, f"a side of the picture has {_TOO_LONG}", "make it smaller, or cut it")
    if longest > _SLENDER * shortest:
        slender = f"the picture has {width} x {height} pixels, one side over {_SLENDER} times the other"
        raise _broken(path, slender, "cut it, or remove its rows")


def _broken(path: Path, problem: str, hint: str) -> RowError:
    return RowError(Problem("picture broken", problem, hint, Place(str(path))))
