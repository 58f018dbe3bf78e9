"""Blind comparison: two models answer one question side by side, and their names are told after the vote."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from demo.talk import ASKING, NOTHING, TROUBLE, WAITING, as_text, begin, in_words, visitor_of
from demo.visitors import Visitor, Visitors
from qllava.config import InputError
from qllava.data.votes import Verdict, VoteFile, tally
from qllava.evaluation.intervals import wilson
from qllava.inference import Chat, Duel, Session, contenders

BUTTONS: dict[Verdict, str] = {"left": "Left is better", "tie": "Equally good", "both_bad": "Both are bad",
                              "right": "Right is better"}  # fmt: skip
View = tuple[Any, ...]  # left chatbot, right chatbot, text box, vote buttons (4), result


class Compare:
    """The handlers of the comparison."""

    def __init__(self, chats: tuple[Chat, Chat], visitors: Visitors, votes: VoteFile, keep: Path | None) -> None:
        self.chats = chats
        self.visitors = visitors
        self.votes = votes
        self.keep = keep

    def ask(self, message: dict[str, Any], first: float, second: float, request: gr.Request) -> View:
        """A question was sent, to be answered at these temperatures."""
        visitor = visitor_of(self.visitors, request)
        if visitor.duel is not None:
            visitor.duel.stopped.set()
        exchange = begin(Session(), self.visitors, visitor, message)
        visitor.question, visitor.pictures = exchange.question, exchange.pictures
        visitor.trouble, visitor.duel = exchange.trouble, None
        if not visitor.trouble:
            try:
                visitor.duel = Duel(contenders(self.chats, (first, second)), random.randrange(2**31))
            except InputError as error:
                visitor.trouble = str(error)
        return self._view(visitor, gr.update(**ASKING))

    def answer(self, system: str, length: float, request: gr.Request) -> Iterator[View]:
        """Both answers, piece by piece."""
        visitor = visitor_of(self.visitors, request)
        duel = visitor.duel
        if duel is not None and not duel.stopped.is_set():
            try:
                hashes = [picture.stem for picture in visitor.pictures]
                growing = duel.answer(
                    visitor.question, visitor.pictures, hashes=hashes, max_new_tokens=int(length), system=system or None
                )
                for _ in growing:
                    yield self._view(visitor, gr.skip())
            except InputError as error:
                visitor.trouble = str(error)
            except Exception as error:  # the page is the only place where its reader can learn of it
                visitor.trouble = in_words(error)
        yield self._view(visitor, gr.update(**WAITING))

    def stop(self, request: gr.Request) -> View:
        """Stop was pressed; both end at the next token, or do not begin, and there is nothing to vote on."""
        visitor = visitor_of(self.visitors, request)
        if visitor.duel is not None:
            visitor.duel.stopped.set()
        return self._view(visitor, gr.update(**WAITING))

    def vote(self, verdict: Verdict, request: gr.Request) -> View:
        """A vote; it is on the disk before the names are told."""
        visitor = visitor_of(self.visitors, request)
        duel, pictures = visitor.duel, visitor.pictures
        if duel is None:
            raise gr.Error("Ask both a question first.")
        try:
            vote = duel.vote(verdict, visitor.rater)
            try:
                for picture in pictures if self.keep is not None else ():
                    self._keep(picture)
                self.votes.append(vote)
            except InputError:
                duel.voted = False
                raise
        except InputError as error:
            raise gr.Error(str(error)) from error
        return self._view(visitor, gr.skip())

    def _keep(self, picture: Path) -> None:
        assert self.keep is not None
        try:
            shutil.copyfile(picture, self.keep / picture.name)
        except OSError as error:
            raise InputError(f"The picture could not be kept ({error.strerror}); the vote was not counted.") from error

    def _view(self, visitor: Visitor, textbox: Any) -> View:
        duel = visitor.duel
        ready = duel is not None and duel.whole and not duel.voted and not visitor.trouble
        buttons = [gr.update(interactive=ready)] * len(BUTTONS)
        return *self._sides(visitor), textbox, *buttons, self._result(duel) if duel is not None and duel.voted else ""

    def _sides(self, visitor: Visitor) -> tuple[list[Any], list[Any]]:
        pictures = [{"path": str(picture)} for picture in visitor.pictures if picture.is_file()]
        asked = {"role": "user", "content": [*pictures, as_text(visitor.question)]}
        if visitor.trouble:
            trouble = gr.ChatMessage(content=as_text(visitor.trouble), metadata={"title": TROUBLE})
            return [asked, trouble], [asked, trouble]
        left, right = ([asked], [asked])
        duel = visitor.duel
        if duel is not None:
            over = duel.whole or duel.stopped.is_set()
            for side, shown in (("left", left), ("right", right)):
                said = duel.answers["left" if side == "left" else "right"]
                if said or over:
                    shown.append({"role": "assistant", "content": as_text(said) or NOTHING})
        return left, right

    def _result(self, duel: Duel) -> str:
        """Who was who, and how the two stand."""
        left, right = duel.contenders["left"].name, duel.contenders["right"].name
        first, second = sorted((left, right))
        found = tally(self.votes.votes, (first, second))
        decided = sum(found.wins)
        votes = decided + found.ties + found.both_bad
        count = f"After {votes} {'vote' if votes == 1 else 'votes'}: {escape(first)} is better {found.wins[0]} times, "
        count += f"{escape(second)} {found.wins[1]} times; equally good {found.ties}, both bad {found.both_bad}."
        if decided:
            low, high = wilson(found.wins[0], decided)
            count += f" Where one was better it was {escape(first)} in {100 * found.wins[0] / decided:.0f} % "
            count += f"(95 % interval {100 * low:.0f} to {100 * high:.0f} %)."
        return f"<p>Left was <b>{escape(left)}</b>, right was <b>{escape(right)}</b>.</p><p>{count}</p>"
