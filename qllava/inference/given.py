"""Images in the forms that the Python API accepts: a path, the bytes of a file, an open file, a PIL image, an array.

    path          str or Path, opened like training data
    file          bytes, or an object with `read` opened in binary mode (`BytesIO`), read from its beginning
    PIL image     of any mode
    array         (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA of NumPy: uint8 from 0 to 255, or floats from 0 to 1

All become upright RGB in the same way as in training (`data/images.py`). Anything else is refused with a hint: a float
array with values up to 255, for example, would be white if it were clamped and dark if it were scaled.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image

from qllava.config import InputError
from qllava.data.images import as_rgb, open_image
from qllava.data.problems import RecordError

GivenImage: TypeAlias = str | Path | bytes | bytearray | IO[bytes] | Image.Image | np.ndarray
"""One image, in any of these forms."""

_EXPECTED = "give a path, the bytes of an image file, a binary file object, a PIL image, or a NumPy array"


def as_list(images: GivenImage | Sequence[GivenImage] | None) -> list[GivenImage]:
    """Return the images of a call that accepts none, one, or several as a list.

    Raises:
        InputError: The value is none of these.
    """
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return list(images)
    return [images]  # type: ignore[list-item]  # `open_given` reports other types


def open_given(image: GivenImage) -> Image.Image:
    """Return one image as upright RGB.

    Raises:
        InputError: The value has another type, or cannot be read.
    """
    if isinstance(image, str | Path):
        if str(image).startswith(("http://", "https://")):
            raise InputError(f"{image} is a URL. Download the image and give its file.")
        return open_image(Path(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return _of_bytes(bytes(image))
    if isinstance(image, np.ndarray):
        return _of_array(image)
    if isinstance(image, Image.Image):
        return _as_rgb(image)
    if hasattr(image, "read"):
        return _of_bytes(_content(image))
    hint = "; make it one with tensor.permute(1, 2, 0).cpu().numpy()" if type(image).__name__ == "Tensor" else ""
    raise InputError(f"An image of type {type(image).__name__} cannot be read: {_EXPECTED}{hint}.")


def _content(file: Any) -> bytes:
    """Read all bytes of a file object from its beginning, because a writer leaves it at its end."""
    if getattr(file, "seekable", lambda: False)():
        file.seek(0)
    content = file.read()
    if not isinstance(content, bytes):
        raise InputError(
            f"A file object of an image returned {type(content).__name__}. Open the file as binary (mode 'rb')."
        )
    return content


def _of_bytes(content: bytes) -> Image.Image:
    if not content:
        raise InputError("An image given as bytes is empty. Give the content of an image file.")
    try:
        return open_image(io.BytesIO(content))  # type: ignore[arg-type]  # Pillow reads from it as from a path
    except RecordError as error:
        raise InputError(
            f"An image given as {len(content):,} bytes cannot be used: {error.problem.problem}; give the content of an "
            "image file, such as a PNG or JPEG."
        ) from error


def _of_array(array: np.ndarray) -> Image.Image:
    shape = array.shape
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if 0 in shape or not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (3, 4))):
        first = array.ndim == 3 and shape[0] in (1, 3, 4)
        hint = "; its channels come first, so give array.transpose(1, 2, 0)" if first else ""
        raise InputError(
            f"An image given as an array has the shape {shape}; expected (height, width), (height, width, 3) or "
            f"(height, width, 4){hint}."
        )
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise InputError(
                f"An image given as an array of {array.dtype} has values from {array.min():g} to {array.max():g}; "
                "expected 0 to 1 (divide by the largest possible value), or uint8."
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(
            f"An image given as an array has the type {array.dtype}; expected uint8 from 0 to 255, or floating point "
            "from 0 to 1."
        )
    return _as_rgb(Image.fromarray(np.ascontiguousarray(array)))


def _as_rgb(image: Image.Image) -> Image.Image:
    try:
        return as_rgb(image)
    except (ValueError, OSError, SyntaxError) as error:
        raise InputError(f"The image cannot be converted to RGB: {error}.") from error
