"""Cases of examples whose image file is broken, in every way that the check must report."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tests.faults.broken_data import GPT, REPLACE, SEEN, SOUND, Case, lines


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.frombytes("L", size, random.Random(0).randbytes(size[0] * size[1]))


def png(size: tuple[int, int] = (30, 30)) -> bytes:
    file = io.BytesIO()
    noise(size).save(file, "PNG")
    return file.getvalue()


def claims(width: int, height: int) -> bytes:
    """Return a PNG whose header claims this size in pixels, without the pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + png()[33:]


def jpeg() -> bytes:
    file = io.BytesIO()
    noise((64, 64)).save(file, "JPEG")
    return file.getvalue()


def bytes_of(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def image(said: str, write: Callable[[Path], object], *, name: str = "other.png", named: bool = True) -> Case:
    """Return a case of an example whose image `write` writes, after a sound example."""
    rows = [SOUND, {"id": "x7", "image": name, "conversations": [SEEN, GPT]}]

    def both(path: Path) -> None:
        write(path.parent / name)
        path.write_text(lines(rows), encoding="utf-8")

    said = f"{{folder}}/{name}: {said}" if named else said
    return Case(both, f"train.json, example 2, id x7: {said}.", id="x7", line=3, samples=2 if named else 1)


IMAGES = {
    "nothing in it": image(f"this is not an image that can be read; {REPLACE}", bytes_of(b"")),
    "text in it": image(f"this is not an image that can be read; {REPLACE}", bytes_of(b"a bus"), name="bus.jpg"),
    "a PNG by its head alone": image(f"this is not an image that can be read; {REPLACE}", bytes_of(png()[:8])),
    "a PNG that is cut off": image(
        f"the image cannot be decoded (image file is truncated); {REPLACE}",
        bytes_of(png((90, 90))[:5000]),
    ),
    "a JPEG that is cut off": image(
        f"the image cannot be decoded (image file is truncated (11 bytes not processed)); {REPLACE}",
        bytes_of(jpeg()[:1500]), name="bus.jpg",
    ),
    "a PNG of 60,000 x 60,000": image(
        "a side of the image has more than 12,000 pixels; resize or crop it",
        bytes_of(claims(60_000, 60_000)),
    ),
    "a PNG of 60,000 x 3": image(
        "a side of the image has more than 12,000 pixels; resize or crop it", bytes_of(claims(60_000, 3))
    ),
    "a line": image(
        "the image has 1 x 201 pixels, one side over 200 times the other; crop it, or remove its examples",
        bytes_of(png((1, 201))),
    ),
    "a link to itself": image(
        "the image 'other.png' is not in the image folder {folder}; add it or give the right folder",
        lambda path: path.symlink_to(path), named=False,
    ),
    "a link that leads nowhere": image(
        "the image 'other.png' is not in the image folder {folder}; add it or give the right folder",
        lambda path: path.symlink_to("gone.png"), named=False,
    ),
    "a link to a text": image(
        f"this is not an image that can be read; {REPLACE}", lambda path: path.symlink_to(path.parent / "train.json")
    ),
    "a pipe": image(
        "the image 'other.png' is not in the image folder {folder}; add it or give the right folder",
        os.mkfifo, named=False,
    ),
}  # fmt: skip
