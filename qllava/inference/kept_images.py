"""Images that users upload: decoded and encoded again, so that only pixels are kept.

The name of a file says nothing about its content, and the content may be more than an image (a location, a second
file). `keep_image` writes the upright pixels in sRGB as PNG, at most `LONGEST` on a side, under the SHA-256 of its
bytes: without EXIF, text or a colour profile, which could contain anything. Pixels of another RGB space are converted
first.
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
"""Pixels on the longer side of a stored image: six times the input of the largest CLIP tower."""
MAX_PIXELS = 50_000_000
"""Maximum pixels of an uploaded image, which takes 150 MB when decoded."""
MAX_PROFILE = 2**20
"""Maximum bytes of a colour profile that is applied; those of cameras and screens have a few thousand."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are opened. Pillow knows more, but passes some of them to other programs (EPS to Ghostscript)."""


def hash_of(image: Path) -> str:
    """Return the SHA-256 under which `keep_image` stores an image; raise an InputError in the same cases."""
    return hashlib.sha256(_written_anew(image, image.name)).hexdigest()


def keep_image(image: Path, folder: Path, name: str) -> Path:
    """Encode an image again into a folder, as SHA256.png, and return the path.

    Args:
        image: File of the upload.
        folder: Folder for the PNG.
        name: The user's name of the image, for messages, which contain no path.

    Raises:
        InputError: The file is not an image, corrupt or too large.
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
        too_large = False  # `open_image` reports the problem
    if too_large:
        raise InputError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels. Use a smaller image.")
    try:
        pixels = open_image(image)
    except RecordError as error:
        raise InputError(f"{name} cannot be used: {error.problem.problem}.") from error
    pixels.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    bare = Image.frombytes("RGB", pixels.size, _as_srgb(pixels, profile).tobytes())  # `save` would write `info` too
    bare.save(written, "png", compress_level=1)
    return written.getvalue()


def _as_srgb(pixels: Image.Image, profile: object) -> Image.Image:
    """Convert RGB pixels from the space of a colour profile to sRGB; without an RGB profile they are sRGB already."""
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_PROFILE:
        return pixels
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != "RGB":  # CMYK or grey, already converted to RGB
            return pixels
        converted = ImageCms.profileToProfile(pixels, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # a corrupt profile
        return pixels
    return converted or pixels
