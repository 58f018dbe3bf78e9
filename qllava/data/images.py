"""Pictures: opened, turned upright, made RGB; what is broken is refused.

A picture is the first frame, upright, and then exactly what Pillow's `convert("RGB")` makes of it (a transparent
pixel keeps its colour; 16 bits are cut to 8), so that training, serving and other programs see the same pixels.
Padding and cropping belong to the image processor, which is saved with the model.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from qllava.config import InputError

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
    """Read a picture of any kind that Pillow knows, as upright RGB, completely decoded.

    Raises InputError, which names the file, when it is missing, broken, cut off or no picture.
    """
    try:
        with Image.open(path) as image:
            image.load()
            turn = _TO_UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
            return (image if turn is None else image.transpose(turn)).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such picture; check the name and the image folder.") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: this is no picture that can be read; replace it, or remove its rows.") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: the picture is too large ({error}); make it smaller.") from None
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead to (SyntaxError, struct.error)
        raise InputError(f"{path}: the picture cannot be decoded ({error}); replace it, or remove its rows.") from error
