"""Uploads of visitors: their owners, their quotas, and when they are removed.

    FOLDER/OWNER/uploads/RANDOM/SHA256.png    an image that is not yet part of a question
    FOLDER/OWNER/page-SESSION/SHA256.png      an image of a question, until its page is closed

While the bytes arrive, they are in memory or in a file without a name, which the operating system removes with the
connection, whatever ends it. Then the image is decoded and only its pixels are written: no uploaded file has a name,
except while it is decoded.

An upload is removed when its page is closed. A browser does not say which of its pages sent a file, but each open page
has a connection (`opened`, `closed`): an upload is removed when all pages that were open at its time are closed.
Uploads of a program without such a connection are removed after `PAGELESS` seconds.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from qllava.config import InputError
from qllava.inference import keep_image

MAX_UPLOAD = 20 * 2**20
"""Maximum bytes of a file."""
MAX_IMAGES = 8
"""Maximum number of images in one question, and of files in one upload."""
MAX_SECONDS = 300
"""Maximum duration of an upload."""
PAGELESS = 300
"""Seconds after which files without an open page are removed."""
EXAMPLES = "examples"


@dataclass(frozen=True)
class Quota:
    """Limit for the images on the disk, including those in transfer."""

    files: int
    """Number of images."""
    size: int
    """Bytes."""


FOR_ONE = Quota(files=100, size=400 * 2**20)
FOR_ALL = Quota(files=2_000, size=4 * 2**30)


class TooMuch(InputError):
    """Error: a quota is used up."""


@dataclass(frozen=True, eq=False)
class Page:
    """The connection of an open page."""

    owner: str
    """Folder name of the visitor."""
    session: str
    """Gradio's name of the page."""


@dataclass(frozen=True, eq=False)
class Upload:
    """An image that is not yet part of a question."""

    owner: str
    """Folder name of the visitor."""
    path: Path
    """File of the pixels."""
    pages: frozenset[Page]
    """Pages of the visitor that were open at its time."""
    at: float = field(default_factory=time.monotonic)
    """Time of the upload, in seconds."""


class Uploads:
    """Images of all visitors."""

    def __init__(self, folder: Path, for_one: Quota = FOR_ONE, for_all: Quota = FOR_ALL) -> None:
        self.folder = folder.resolve()
        self.for_one, self.for_all = for_one, for_all
        self._pages: set[Page] = set()
        self._waiting: dict[Path, Upload] = {}
        self._arriving: dict[object, tuple[str, int, int]] = {}  # owner, files, bytes
        self._lock = threading.Lock()
        self._one_image = threading.Lock()

    def opened(self, owner: str, session: str) -> Page:
        """Register a page that was opened, and return it."""
        page = Page(owner, session)
        with self._lock:
            self._pages.add(page)
        return page

    def closed(self, page: Page) -> None:
        """Unregister a page that was closed, and remove the uploads that only it can have sent."""
        with self._lock:
            self._pages.discard(page)
        self._remove(lambda upload: bool(upload.pages) and not upload.pages & self._pages)

    def is_open(self, owner: str, session: str) -> bool:
        """Return whether a page has an open connection."""
        with self._lock:
            return any((page.owner, page.session) == (owner, session) for page in self._pages)

    def sweep(self) -> None:
        """Remove old uploads without an open page."""
        self._remove(lambda upload: not upload.pages and time.monotonic() - upload.at > PAGELESS)

    async def receive(self, owner: str, request: Request, size: int) -> list[Path]:
        """Receive the files of a form, and return the paths of their pixels, in order.

        Args:
            owner: Folder name of the visitor.
            request: The upload; if its connection ends early, nothing of it is kept.
            size: Number of bytes that it announced.

        Raises:
            TooMuch: A quota is used up.
            InputError: A file is too large or not an image, the form cannot be read, or it takes too long.
        """
        with self._lock:
            pages = frozenset(page for page in self._pages if page.owner == owner)
        kept: list[Path] = []
        try:
            with self._arrives(owner, size):
                async with asyncio.timeout(MAX_SECONDS), request.form(max_files=MAX_IMAGES, max_fields=8) as form:
                    files = [file for file in form.getlist("files") if isinstance(file, UploadFile)]
                    for file in files:
                        kept.append(await run_in_threadpool(self._keep, owner, file))
            with self._lock:
                self._waiting |= {path: Upload(owner, path, pages) for path in kept}
                late = bool(pages) and not pages & self._pages
            if late:  # its pages were closed in the meantime
                self._remove(lambda upload: upload.path in kept)
        except BaseException as error:
            for path in kept:
                self._drop(path)
            if isinstance(error, HTTPException | MultiPartException):
                said = error.detail if isinstance(error, HTTPException) else error.message
                raise InputError(f"The upload cannot be read: {said}") from error
            if isinstance(error, TimeoutError):
                raise InputError(f"The upload took more than {MAX_SECONDS} seconds.") from error
            raise
        return kept

    def take(self, owner: str, path: Path, folder: Path) -> Path:
        """Move an image of an owner into the folder of a page, and return its new path.

        Raises:
            InputError: The image no longer exists.
        """
        with self._lock:
            upload = self._waiting.pop(path, None)
        target = folder / path.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path != target:
                shutil.copyfile(path, target)
        except OSError as error:
            raise InputError("This image was removed from the server. Upload the image again.") from error
        if upload is not None and upload.owner == owner:
            self._drop(path)
        return target

    @contextmanager
    def _arrives(self, owner: str, size: int) -> Iterator[None]:
        """Count the announced upload, or raise TooMuch before a byte of it is read."""
        ticket = object()
        with self._lock:
            self._arriving[ticket] = (owner, 1, size)
        try:
            self._check(owner)
            yield
            with self._lock:
                del self._arriving[ticket]  # now on the disk, where pixels take another number of bytes
            self._check(owner)
        finally:
            with self._lock:
                self._arriving.pop(ticket, None)

    def _check(self, owner: str) -> None:
        for whose, quota in ((owner, self.for_one), (None, self.for_all)):
            files, size = self.used(whose)
            if files > quota.files or size > quota.size:
                most = f"{quota.files:,} images or {quota.size / 2**20:,.0f} MB"
                if whose is None:
                    raise TooMuch(f"The images of all visitors have reached the limit of {most}. Try again later.")
                raise TooMuch(
                    f"Your images have reached the limit of {most}. Clear the conversation, or reload the page."
                )

    def used(self, owner: str | None = None) -> tuple[int, int]:
        """Return the number of images, and their bytes, of one owner or of all."""
        with self._lock:
            counted = [(files, size) for whose, files, size in self._arriving.values() if owner in (None, whose)]
        for folder, _, files in os.walk(self.folder / (owner or "")):  # skips folders removed in the meantime
            if EXAMPLES in Path(folder).relative_to(self.folder).parts[:1]:
                continue
            for file in files:
                with suppress(FileNotFoundError):  # removed in the meantime
                    counted.append((1, Path(folder, file).stat().st_size))
        return sum(files for files, _ in counted), sum(size for _, size in counted)

    def _keep(self, owner: str, file: UploadFile) -> Path:
        """Write the pixels of an uploaded file; the copy that is decoded is removed at once."""
        name = re.sub(r"[^\w.\- ]", "", Path(file.filename or "").name)[:100] or "the file"
        if (file.size or 0) > MAX_UPLOAD:
            raise TooMuch(f"{name} is larger than {MAX_UPLOAD // 2**20} MB.")
        place = self.folder / owner / "uploads" / secrets.token_hex(8)
        with self._lock:
            place.mkdir(parents=True)
        sent = place / "sent"
        try:
            with self._one_image:  # decoded one by one, so that many visitors need no more memory than one
                _copy(file.file, sent)
                path = keep_image(sent, place, name)
            sent.unlink()
        except BaseException:
            self._drop(sent)
            raise
        return path

    def _remove(self, wanted: Callable[[Upload], bool]) -> None:
        with self._lock:
            gone = [upload for upload in self._waiting.values() if wanted(upload)]
            for upload in gone:
                del self._waiting[upload.path]
        for upload in gone:
            self._drop(upload.path)

    def _drop(self, path: Path) -> None:
        shutil.rmtree(path.parent, ignore_errors=True)
        self.remove_empty(path.parents[2])

    def remove_empty(self, mine: Path) -> None:
        """Remove the folder of an owner if it has no image any more."""
        with self._lock:
            for place in (mine / "uploads", mine):
                try:
                    place.rmdir()
                except FileNotFoundError:
                    continue
                except OSError:  # the folder is not empty
                    return


def _copy(source: BinaryIO, target: Path) -> None:
    source.seek(0)
    with target.open("wb") as out:
        shutil.copyfileobj(source, out)
