"""Images that a data file holds itself, unpacked into the cache once for all records that show them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from qllava.config import InputError, cache_folder

_MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp", b"II*": ".tif", b"MM\0": ".tif"}


def unpack(data: bytes) -> Path:
    """Write the bytes of a picture into the cache, where they are not there yet; the same bytes are the same file.

    Returns its absolute path. Processes may do so at the same time. Raises InputError when the cache cannot be written.
    """
    name = hashlib.sha256(data).hexdigest()[:32]
    suffix = next((s for magic, s in _MAGIC.items() if data.startswith(magic)), ".bin")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        suffix = ".webp"
    folder = cache_folder().absolute() / "pictures" / name[:2]
    path = folder / f"{name}{suffix}"
    aside = folder / f".{name}-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        # The size is looked at because a machine that loses its power can leave a file of this name empty.
        if path.is_file() and path.stat().st_size == len(data):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(data)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder.parent}: the pictures of the data file cannot be unpacked here ({error.strerror}); "
            "make room, or set QLLAVA_CACHE to another folder."
        ) from error
    return path
