"""Images embedded in a data file, unpacked into the cache once for all records that show them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qllava.config import InputError, cache_folder
from qllava.files import whole_file

_MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp", b"II*": ".tif", b"MM\0": ".tif"}


def _suffix(data: bytes) -> str | None:
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for magic, suffix in _MAGIC.items() if data.startswith(magic)), None)


def is_image(data: bytes) -> bool:
    """Return whether bytes begin with the signature of a common image format."""
    return _suffix(data) is not None


def bytes_or_path(value: Any) -> Any:
    """Return the bytes or the path in the {"bytes", "path"} of Hugging Face; any other value unchanged."""
    if isinstance(value, dict) and value and value.keys() <= {"bytes", "path"}:
        return value.get("path") if value.get("bytes") is None else value["bytes"]
    return value


def unpack(data: bytes) -> Path:
    """Write the bytes of an image into the cache, unless they are there; equal bytes are one file.

    Several processes may do so at the same time.

    Returns:
        Absolute path of the file.

    Raises:
        InputError: The cache cannot be written.
    """
    name = hashlib.sha256(data).hexdigest()[:32]
    folder = cache_folder().absolute() / "pictures" / name[:2]
    path = folder / f"{name}{_suffix(data) or '.bin'}"
    try:
        # The size is checked because a power failure can leave an empty file of this name.
        if path.is_file() and path.stat().st_size == len(data):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path, durable=False) as aside:  # a flush for each of a million images takes an hour
            aside.write_bytes(data)
    except OSError as error:
        raise InputError(
            f"{folder.parent}: the images of the data file cannot be unpacked here ({error.strerror}); "
            "free disk space, or set QLLAVA_CACHE to another folder."
        ) from error
    return path
