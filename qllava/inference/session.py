"""A conversation that goes on: questions and answers so far, asked again, edited, stopped, and how fast they came.

The terminal and the browser hold one `Session` for each person. What went wrong is kept to be shown, and left out of
what the model reads.
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
    """How to answer."""

    system: str | None = None
    temperature: float | None = None
    """0 for the likeliest token; None for 0, or for the model's own where its chat takes what it recommends."""
    max_new_tokens: int = 512
    seed: int | None = None


@dataclass
class Exchange:
    """A question with its images, and what came of it."""

    question: str
    images: tuple[Path, ...]
    answer: str = ""
    trouble: str = ""  # why no answer came, for people
    begun: bool = False  # somebody computes the answer, or has
    over: bool = False  # nothing more will come
    pace: str = ""  # how fast the answer came, for people
    stop: threading.Event = field(default_factory=threading.Event)  # set by whoever wants no more of the answer

    @property
    def answered(self) -> bool:
        """Whether the model is to read it with the next question."""
        return bool(self.answer) and not self.trouble


@dataclass
class Session:
    """One person's conversation with one model. `stop` may be called from any thread."""

    exchanges: list[Exchange] = field(default_factory=list)
    _claiming: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, question: str, images: Sequence[Path] = ()) -> Exchange:
        """Add a question, which `answer` then answers; an answer that is under way is stopped."""
        self.stop()
        self.exchanges.append(Exchange(question, tuple(images)))
        return self.exchanges[-1]

    def ask_again(self, index: int = -1, question: str | None = None) -> Exchange:
        """Forget an answer and all that came after it, and ask again, in other words perhaps. Raises InputError."""
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
        """End the answer that is under way at its next token, or one that waits in line before it begins."""
        with self._claiming:
            for exchange in self.exchanges:
                if not exchange.over:
                    exchange.stop.set()
                    exchange.over = not exchange.begun

    def answer(self, chat: Chat, settings: Settings) -> Iterator[str]:
        """Answer the last question: the whole text so far, as it grows; nothing, if that was begun or given up before.

        Closing the iterator ends the computation, too. Raises InputError for what the model cannot be asked.
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
