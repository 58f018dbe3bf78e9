"""Images that people hand in: decoded and written again, so that only pixels are kept.

A file's name says nothing of its content, and its content may hold more than an image (a place, a second file). What
`keep_image` writes is the upright pixels in sRGB as PNG, at most `LONGEST` on a side, under the SHA-256 of its bytes:
no EXIF, no text, and no colour profile, which may hold anything too. Pixels of another RGB space are converted first.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from PIL import Image, ImageCms, UnidentifiedImageError

from qllava.config import InputError
from qllava.data.images import open_image
from qllava.data.problems import RecordError
from qllava.files import whole_file

LONGEST = 2048
"""Pixels on the longer side of a kept image: six times what the largest CLIP tower looks at."""
MAX_PIXELS = 50_000_000
"""Of an image that is handed in: decoded, 150 MB."""
MAX_PROFILE = 2**20
"""Bytes of a colour profile that is applied; those of cameras and screens have some thousand."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is opened for others. Pillow knows more, and hands some of it to other programs (EPS to Ghostscript)."""


def hash_of(image: Path) -> str:
    """The SHA-256 under which `keep_image` keeps an image. Raises InputError as it does."""
    return hashlib.sha256(_written_anew(image, image.name)).hexdigest()


def keep_image(image: Path, folder: Path, name: str) -> Path:
    """Write an image again into a folder, as SHA256.png; `name` is what its owner calls it.

    Raises InputError, which names no path, when it is not an image, corrupt or too large.
    """
    content = _written_anew(image, name)
    path = folder / f"{hashlib.sha256(content).hexdigest()}.png"
    with whole_file(path, durable=False) as aside:
        aside.write_bytes(content)
    return path


def _written_anew(image: Path, name: str) -> bytes:
    Image.init()
    profile: object = None
    try:
        with Image.open(image, formats=[f for f in FORMATS if f in Image.OPEN]) as opened:  # reads the header only
            too_large = opened.width * opened.height > MAX_PIXELS
            profile = opened.info.get("icc_profile")
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image in a supported format. Use PNG, JPEG, WebP, GIF or TIFF.") from None
    except Image.DecompressionBombError:
        too_large = True
    except (OSError, ValueError, SyntaxError):
        too_large = False  # `open_image` says what is wrong
    if too_large:
        raise InputError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels. Use a smaller image.")
    try:
        pixels = open_image(image)
    except RecordError as error:
        raise InputError(f"{name} cannot be used: {error.problem.problem}.") from error
    pixels.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    bare = Image.frombytes("RGB", pixels.size, _as_srgb(pixels, profile).tobytes())  # `save` writes what `info` holds
    bare.save(written, "png", compress_level=1)
    return written.getvalue()


def _as_srgb(pixels: Image.Image, profile: object) -> Image.Image:
    """Convert RGB pixels from the space of a colour profile; without one that is for RGB they are sRGB already."""
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_PROFILE:
        return pixels
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != "RGB":  # of CMYK or grey, which are RGB by now
            return pixels
        converted = ImageCms.profileToProfile(pixels, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # a damaged profile
        return pixels
    return converted or pixels
