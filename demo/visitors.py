"""Who is here: one visitor for each open page, with a conversation, a comparison, and a folder of pictures."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from demo.guard import COOKIE, EXAMPLES, MAX_PICTURES, owner_of
from qllava.config import InputError
from qllava.inference import Duel, Session, keep_picture

IDLE = 3600
"""Seconds after which a visitor who is not heard of is forgotten, should the page's end go unnoticed."""


@dataclass
class Visitor:
    """One open page. Only its own requests reach it."""

    owner: str  # of the cookie
    rater: str  # the name that votes are given under
    folder: Path
    session: Session = field(default_factory=Session)
    duel: Duel | None = None
    question: str = ""  # of the comparison, with its pictures
    pictures: tuple[Path, ...] = ()
    trouble: str = ""
    seen: float = field(default_factory=time.monotonic)

    def leave(self) -> None:
        """Stop what is computed and delete the pictures."""
        self.session.clear()
        if self.duel is not None:
            self.duel.stopped.set()
        shutil.rmtree(self.folder, ignore_errors=True)


class Visitors:
    """All visitors of the process, and the pictures they hand in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._visitors: dict[tuple[str, str], Visitor] = {}
        self._lock = threading.Lock()
        self._one_picture = threading.Lock()

    def of(self, request: gr.Request) -> Visitor:
        """The visitor behind a `gr.Request`. Raises InputError for one without the page's cookie."""
        owner = owner_of(request.cookies.get(COOKIE))
        if owner is None:
            raise InputError("This page needs its cookie; allow it, and load the page again.")
        page = re.sub(r"\W", "", str(request.session_hash))[:64]
        with self._lock:
            for key, visitor in list(self._visitors.items()):
                if time.monotonic() - visitor.seen > IDLE:
                    self._visitors.pop(key).leave()
            if (owner, page) not in self._visitors:
                rater = request.username or f"anonymous-{owner[:8]}"
                self._visitors[owner, page] = Visitor(owner, rater, self.folder / owner / f"page-{page}")
            visitor = self._visitors[owner, page]
            visitor.seen = time.monotonic()
        return visitor

    def leave(self, request: gr.Request) -> None:
        """A page was closed."""
        page = re.sub(r"\W", "", str(request.session_hash))[:64]
        with self._lock:
            gone = [self._visitors.pop(key) for key in list(self._visitors) if key[1] == page]
            here = {visitor.owner for visitor in self._visitors.values()}
        for visitor in gone:
            visitor.leave()
            if visitor.owner not in here:  # with the last page go uploads that were never asked about
                shutil.rmtree(self.folder / visitor.owner, ignore_errors=True)

    def leave_all(self) -> None:
        """The process ends; a model that still computes would be torn out of its thread."""
        with self._lock:
            gone, self._visitors = list(self._visitors.values()), {}
        for visitor in gone:
            visitor.leave()

    def take(self, visitor: Visitor, files: Sequence[str]) -> tuple[Path, ...]:
        """Pictures that were handed in, written anew into the visitor's folder; what was sent is deleted.

        Raises InputError when one is not the visitor's own, is no picture, or they are too many.
        """
        mine, examples = self.folder / visitor.owner, self.folder / EXAMPLES
        paths = [Path(file).resolve() for file in files]
        if not all(path.is_relative_to(mine) or path.is_relative_to(examples) for path in paths):
            raise InputError("This picture is not yours; upload it again.")
        try:
            if len(paths) > MAX_PICTURES:
                raise InputError(f"{len(paths)} pictures are too many for one question; at most {MAX_PICTURES}.")
            visitor.folder.mkdir(parents=True, exist_ok=True)
            with self._one_picture:  # decoded one after the other, so that many visitors need no more memory than one
                return tuple(keep_picture(path, visitor.folder, path.name) for path in paths)
        finally:
            for path in paths:
                if path.is_relative_to(mine / "uploads"):
                    shutil.rmtree(path.parent, ignore_errors=True)
