"""Visitors: one for each open page, with a conversation, a comparison, and a folder of images."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from qllava.config import InputError
from qllava.inference import Session, keep_image
from qllava.pages.access import Cookies
from qllava.pages.uploads import EXAMPLES, MAX_IMAGES, PAGELESS, Uploads
from qllava.voting.duel import Duel

IDLE = 3600
"""Seconds after which an open page without requests is forgotten."""


@dataclass
class Visitor:
    """One open page; only its own requests reach it."""

    owner: str
    """Folder name, derived from the cookie."""
    rater: str
    """Name under which votes are saved."""
    folder: Path
    """Folder of the page's images."""
    session: Session = field(default_factory=Session)
    """Conversation of the chat."""
    duel: Duel | None = None
    """Comparison in progress."""
    question: str = ""
    """Question of the comparison."""
    images: tuple[Path, ...] = ()
    """Images of the comparison."""
    trouble: str = ""
    """Reason for a comparison without answers, for display."""
    voted: Duel | None = None
    """The comparison whose vote is on the disk."""
    seen: float = field(default_factory=time.monotonic)
    """Time of the last request, in seconds."""

    def leave(self) -> None:
        """Stop computations and delete the images."""
        self.session.clear()
        if self.duel is not None:
            self.duel.stopped.set()
        shutil.rmtree(self.folder, ignore_errors=True)

    def tidy(self) -> None:
        """Delete the images that are no longer part of the conversation or the comparison."""
        shown = {path for exchange in self.session.exchanges for path in exchange.images} | set(self.images)
        for path in self.folder.glob("*"):
            if path not in shown:
                path.unlink(missing_ok=True)


class Visitors:
    """All visitors of the process, and the images they upload."""

    def __init__(self, uploads: Uploads, cookies: Cookies) -> None:
        self.uploads = uploads
        self.cookies = cookies
        self._visitors: dict[tuple[str, str], Visitor] = {}
        self._lock = threading.Lock()

    def of(self, request: gr.Request) -> Visitor:
        """Return the visitor of a request, or raise an InputError if it lacks the page's cookie."""
        owner, page = self._key(request)
        if owner is None:
            raise InputError("This page needs its cookie. Allow cookies and reload the page.")
        with self._lock:
            if (owner, page) not in self._visitors:
                rater = request.username or f"anonymous-{owner[:8]}"
                folder = self.uploads.folder / owner / f"page-{page}"
                self._visitors[owner, page] = Visitor(owner, rater, folder)
            visitor = self._visitors[owner, page]
            visitor.seen = time.monotonic()
        return visitor

    def leave(self, request: gr.Request) -> None:
        """Forget the visitor whose page was closed."""
        left = self._key(request)
        self._forget(lambda key, _: key == left)

    def _key(self, request: gr.Request) -> tuple[str | None, str]:
        """Return the owner by the cookie, or None without one, and the page, as a name for a folder."""
        owner = self.cookies.owner(request.headers.get("cookie"))
        return owner, re.sub(r"\W", "", str(request.session_hash))[:64]

    def leave_all(self) -> None:
        """Forget all visitors at the end of the process, which would otherwise kill the thread of a computing model."""
        self._forget(lambda *_: True)

    def sweep(self) -> None:
        """Forget pages without requests: soon if they have no connection, later if they have one."""
        self.uploads.sweep()
        now = time.monotonic()
        self._forget(
            lambda key, visitor: now - visitor.seen > (IDLE if self.uploads.is_open(*key) else min(PAGELESS, IDLE))
        )

    def sweep_for_ever(self, seconds: float = 15) -> None:
        """Call `sweep` repeatedly, in a thread that ends with the process."""

        def run() -> None:
            while True:
                time.sleep(seconds)
                self.sweep()

        threading.Thread(target=run, name="qllava-sweep", daemon=True).start()

    def _forget(self, wanted: Callable[[tuple[str, str], Visitor], bool]) -> None:
        with self._lock:
            keys = [key for key, visitor in self._visitors.items() if wanted(key, visitor)]
            gone = [self._visitors.pop(key) for key in keys]
        for visitor in gone:
            visitor.leave()
            self.uploads.remove_empty(visitor.folder.parent)

    def take(self, visitor: Visitor, files: Sequence[str]) -> tuple[Path, ...]:
        """Move uploaded images into the visitor's folder.

        Raises:
            InputError: An image is not the visitor's own, no longer exists, or there are too many.
        """
        mine, examples = self.uploads.folder / visitor.owner, self.uploads.folder / EXAMPLES
        paths = [Path(file).resolve() for file in files]
        if not all(path.is_relative_to(mine) or path.is_relative_to(examples) for path in paths):
            raise InputError("This image belongs to another visitor. Upload the image again.")
        if len(paths) > MAX_IMAGES:
            raise InputError(f"{len(paths)} images are too many for one question. The limit is {MAX_IMAGES}.")
        visitor.folder.mkdir(parents=True, exist_ok=True)
        return tuple(
            self.uploads.take(visitor.owner, path, visitor.folder)
            if path.is_relative_to(mine)
            else keep_image(path, visitor.folder, path.name)
            for path in paths
        )
