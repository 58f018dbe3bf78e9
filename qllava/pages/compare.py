"""Blind comparison: two models answer one question side by side, and their names are shown after the vote."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import escape

from qllava.config import InputError
from qllava.evaluation.intervals import wilson
from qllava.inference import Chat, Session
from qllava.pages.talk import ASKING, NOTHING, WAITING, as_text, asked, begin, in_words, not_answered, visitor_of
from qllava.pages.visitors import Visitor, Visitors
from qllava.voting.duel import Duel, contenders
from qllava.voting.votes import Tally, Verdict, VoteFile, tally

BUTTONS: dict[Verdict, str] = {"left": "Left is better", "tie": "Equally good", "both_bad": "Both are bad",
                              "right": "Right is better"}  # fmt: skip
ENOUGH = 10
"""Number of votes from which the tally is shown, because fewer say nothing."""
View = tuple[Any, ...]  # question, left answer, right answer (chatbots), text box, vote buttons (4), result


class Compare:
    """Event handlers of the comparison."""

    def __init__(
        self,
        chats: tuple[Chat, Chat],
        visitors: Visitors,
        votes: VoteFile,
        keep: Path | None,
        examples: list[dict[str, Any]],
    ) -> None:
        self.chats = chats
        self.examples = examples
        self.visitors = visitors
        self.votes = votes
        self.keep = keep

    def ask(self, message: dict[str, Any], first: float, second: float, request: gr.Request) -> View:
        """Handle a sent question, which will be answered at these temperatures."""
        visitor = visitor_of(self.visitors, request)
        if visitor.duel is not None:
            visitor.duel.stopped.set()
        exchange = begin(Session(), self.visitors, visitor, message)
        visitor.question, visitor.images = exchange.question, exchange.images
        visitor.trouble, visitor.duel = exchange.trouble, None
        visitor.tidy()
        if not visitor.trouble:
            try:
                visitor.duel = Duel(contenders(self.chats, (first, second)), random.randrange(2**31))
            except InputError as error:
                visitor.trouble = str(error)
        return self._view(visitor, gr.update(**ASKING))

    def example(self, first: float, second: float, event: gr.SelectData, request: gr.Request) -> View:
        """Handle a click on an example, which will be answered at these temperatures."""
        return self.ask(self.examples[event.index], first, second, request)

    def answer(self, system: str, length: float, request: gr.Request) -> Iterator[View]:
        """Yield both answers, piece by piece."""
        visitor = visitor_of(self.visitors, request)
        duel = visitor.duel
        if duel is not None and not duel.stopped.is_set():
            try:
                hashes = [image.stem for image in visitor.images]
                growing = duel.answer(
                    visitor.question, visitor.images, hashes=hashes, max_new_tokens=int(length), system=system or None
                )
                for _ in growing:
                    yield self._view(visitor, gr.skip())
            except InputError as error:
                visitor.trouble = str(error)
            except Exception as error:  # the page is the only place where its user can see it
                visitor.trouble = in_words(error)
        yield self._view(visitor, gr.update(**WAITING))

    def stop(self, request: gr.Request) -> View:
        """Handle the stop button: both answers end at the next token, or do not begin, and cannot be voted on."""
        visitor = visitor_of(self.visitors, request)
        if visitor.duel is not None:
            visitor.duel.stopped.set()
        return self._view(visitor, gr.update(**WAITING))

    def vote(self, verdict: Verdict, request: gr.Request) -> View:
        """Save a vote on the disk before the names are shown."""
        visitor = visitor_of(self.visitors, request)
        duel, images = visitor.duel, visitor.images
        if duel is None:
            raise gr.Error("Ask a question before you vote.")
        try:
            vote = duel.vote(verdict, visitor.rater)
            try:
                for image in images if self.keep is not None else ():
                    self._keep(image)
                self.votes.append(vote)
            except InputError:
                duel.voted = False
                raise
            visitor.voted = duel
        except InputError as error:
            raise gr.Error(str(error)) from error
        return self._view(visitor, gr.skip())

    def _keep(self, image: Path) -> None:
        assert self.keep is not None
        try:
            shutil.copyfile(image, self.keep / image.name)
        except OSError as error:
            raise InputError(
                f"The image could not be saved ({error.strerror}), so the vote was not counted."
            ) from error

    def _view(self, visitor: Visitor, textbox: Any) -> View:
        duel = visitor.duel
        ready = duel is not None and duel.whole and not duel.voted and not visitor.trouble
        buttons = [gr.update(interactive=ready)] * len(BUTTONS)
        # `duel.voted` is true while the vote is written, and a write can fail: no name is shown before it is done.
        result = self._result(duel) if duel is not None and visitor.voted is duel else ""
        return _asked(visitor), *_answers(visitor), textbox, *buttons, result

    def _result(self, duel: Duel) -> str:
        """Return which model was on which side, and the tally of the two."""
        left, right = duel.contenders["left"].name, duel.contenders["right"].name
        first, second = sorted((left, right))
        named = f"<p>Left was <b>{escape(left)}</b>, right was <b>{escape(right)}</b>.</p>"
        return named + tally_bar(tally(self.votes.votes, (first, second)), (first, second))


def tally_bar(found: Tally, names: tuple[str, str]) -> str:
    """Return the votes on two models as a bar with a caption, in HTML; nothing before there are `ENOUGH`."""
    parts = [
        (f"{names[0]} better", found.wins[0], "first"),
        ("equally good", found.ties, "tie"),
        ("both bad", found.both_bad, "bad"),
        (f"{names[1]} better", found.wins[1], "second"),
    ]
    votes, decided = sum(count for _, count, _ in parts), sum(found.wins)
    if votes < ENOUGH:
        return ""
    bar = "".join(f'<span class="{kind}" style="flex-grow:{count}"></span>' for _, count, kind in parts if count)
    key = "".join(f'<li class="{kind}">{escape(name)}: {count}</li>' for name, count, kind in parts)
    note = f"{votes} votes"
    if decided:
        low, high = wilson(found.wins[0], decided)
        note += f"; where one was better it was {escape(names[0])} in {100 * found.wins[0] / decided:.0f} % "
        note += f"(95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
    return (
        f'<div class="tally"><div class="bar" aria-hidden="true">{bar}</div><ul>{key}</ul><small>{note}.</small></div>'
    )


def _asked(visitor: Visitor) -> list[Any]:
    """Return the question with its images, and the reason if it cannot be answered."""
    trouble = [not_answered(visitor.trouble)] if visitor.trouble else []
    return [asked(visitor.question, visitor.images), *trouble]


def _answers(visitor: Visitor) -> tuple[list[Any], list[Any]]:
    """Return the answers so far, left and right."""
    duel = visitor.duel
    if duel is None or visitor.trouble:
        return [], []
    over = duel.whole or duel.stopped.is_set()
    left, right = (
        [{"role": "assistant", "content": as_text(said) or NOTHING}] if said or over else []
        for said in (duel.answers["left"], duel.answers["right"])
    )
    return left, right
