"""A conversation in progress: its questions and answers, which can be repeated, edited and stopped, and their speed.

The terminal and the browser have one `Session` per user. Errors are stored for display, and left out of the model's
input.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from qllava.config import InputError
from qllava.conversation import Conversation, Turn
from qllava.inference.chat import Chat
from qllava.inference.prompts import user_turn


@dataclass(frozen=True)
class Settings:
    """Settings of an answer."""

    system: str | None = None
    """System prompt; None for the template's own."""
    temperature: float | None = None
    """0 for greedy; None for 0, or for the model's own if its recommended sampling is used."""
    max_new_tokens: int = 512
    """Maximum tokens of an answer."""
    seed: int | None = None
    """Seed of sampling; None for a random one."""


@dataclass
class Exchange:
    """A question with its images, and its answer or error."""

    question: str
    """The question."""
    images: tuple[Path, ...]
    """Its images."""
    answer: str = ""
    """The answer so far."""
    trouble: str = ""
    """Reason for a missing answer, for display."""
    begun: bool = False
    """Whether the answer is being computed, or has been."""
    over: bool = False
    """Whether nothing more will come."""
    pace: str = ""
    """Speed of the answer, for display."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Event that stops the answer."""

    @property
    def answered(self) -> bool:
        """Whether the model reads it with the next question."""
        return bool(self.answer) and not self.trouble


@dataclass
class Session:
    """One user's conversation with one model. `stop` may be called from any thread."""

    exchanges: list[Exchange] = field(default_factory=list)
    """Questions and answers in order."""
    _claiming: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, question: str, images: Sequence[Path] = ()) -> Exchange:
        """Add a question for `answer`; an answer in progress is stopped."""
        self.stop()
        self.exchanges.append(Exchange(question, tuple(images)))
        return self.exchanges[-1]

    def ask_again(self, index: int = -1, question: str | None = None) -> Exchange:
        """Remove an answer and everything after it, and ask again, optionally with another question.

        Raises:
            InputError: The session has no question yet, or the new question is the same.
        """
        if not self.exchanges:
            raise InputError("Ask a question first. This conversation has none yet.")
        if question is not None and not question.strip():
            raise InputError("The question is unchanged. Edit the question before sending it.")
        old = self.exchanges[index]
        self.stop()
        del self.exchanges[index:]
        return self.ask(old.question if question is None else question, old.images)

    def clear(self) -> None:
        """Start a new conversation; an answer in progress is stopped."""
        self.stop()
        self.exchanges.clear()

    def stop(self) -> None:
        """Stop the answer in progress at its next token, or a waiting one before it begins."""
        with self._claiming:
            for exchange in self.exchanges:
                if not exchange.over:
                    exchange.stop.set()
                    exchange.over = not exchange.begun

    def answer(self, chat: Chat, settings: Settings) -> Iterator[str]:
        """Answer the last question, yielding the whole text so far; nothing if that was begun or stopped before.

        Closing the iterator stops the computation too.

        Raises:
            InputError: The model cannot be asked this question.
        """
        exchange = self.exchanges[-1]
        with self._claiming:
            if exchange.begun or exchange.over:
                return
            exchange.begun = True
        try:
            yield from self._grow(exchange, chat, settings)
        finally:
            exchange.over = True

    def _grow(self, exchange: Exchange, chat: Chat, settings: Settings) -> Iterator[str]:
        before = [done for done in self.exchanges if done.answered and done is not exchange]
        turns: list[Turn] = []
        for done in before:
            turns += [user_turn(done.question, len(done.images)), Turn(role="assistant", content=done.answer)]
        turns.append(user_turn(exchange.question, len(exchange.images)))
        pieces = chat.reply(
            Conversation(turns=tuple(turns), system=settings.system or None),
            [image for done in (*before, exchange) for image in done.images],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            stop=exchange.stop,
        )
        begun, first = time.perf_counter(), 0.0
        with closing(pieces):  # type: ignore[type-var]  # it is a generator
            while not exchange.stop.is_set() and (piece := next(pieces, None)) is not None:
                first = first or time.perf_counter() - begun
                exchange.answer += piece
                yield exchange.answer
        exchange.pace = _pace(chat, exchange.answer, first, time.perf_counter() - begun)


def _pace(chat: Chat, answer: str, first: float, seconds: float) -> str:
    tokens = len(chat.processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
    if tokens < 2:
        return f"1 token after {first:.2f} s" if tokens else ""
    return (
        f"{tokens} tokens: the first after {first:.2f} s, then {(tokens - 1) / max(seconds - first, 1e-6):.0f} a second"
    )
