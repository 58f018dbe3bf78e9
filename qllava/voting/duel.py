"""A question answered by two models, whose names are hidden until the vote.

duel = Duel(contenders((chat, other), (0.0, 0.0)), seed=7)    # the seed decides who is on the left
for left, right in duel.answer("What is this?", [image]):
    show(left, right)
file.append(duel.vote("left", rater="anna"))
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qllava.config import InputError
from qllava.conversation import Conversation, ask
from qllava.inference.about import label
from qllava.inference.chat import Chat
from qllava.inference.given import GivenImage
from qllava.inference.prompts import user_turn
from qllava.voting.votes import Side, Verdict, Vote


@dataclass(frozen=True)
class Contender:
    """A model and its way of answering."""

    chat: Chat
    """The model."""
    temperature: float
    """Temperature of its answers; 0 for greedy."""
    name: str
    """Name shown after the vote."""


def contenders(chats: tuple[Chat, Chat], temperatures: tuple[float, float]) -> tuple[Contender, Contender]:
    """Return two models, or one twice, under different names.

    Raises:
        InputError: It is one model at one temperature, so that there is nothing to compare.
    """
    same = chats[0] is chats[1]
    if same and temperatures[0] == temperatures[1]:
        raise InputError(
            f"Both sides would be {label(chats[0])} at the same temperature. Choose two temperatures or two models."
        )
    names = [label(chat) for chat in chats]
    pieces = 1
    while names[0] == names[1] and not same and pieces < 9:  # two folders `merged`: their parent folders differ
        pieces += 1
        names = ["/".join(Path(chat.name).resolve().parts[-pieces:]) for chat in chats]
    pairs = zip(chats, temperatures, names, strict=True)
    first, second = (Contender(c, t, f"{name} (temperature {t:g})" if t > 0 else name) for c, t, name in pairs)
    return first, second


class Duel:
    """One question to two contenders, on sides drawn with a seed."""

    def __init__(self, pair: tuple[Contender, Contender], seed: int) -> None:
        self.seed = seed
        left = random.Random(seed).randrange(2)
        self.contenders: dict[Side, Contender] = {"left": pair[left], "right": pair[1 - left]}
        self.answers: dict[Side, str] = {"left": "", "right": ""}
        self.whole = False  # whether both have answered completely
        self.voted = False
        self._claiming = threading.Lock()
        self._begun = False
        self.stopped = threading.Event()
        self._question = ""
        self._turns: tuple[dict[str, str], ...] = ()
        self._hashes: tuple[str, ...] = ()

    def answer(
        self,
        question: str,
        images: Sequence[GivenImage],
        *,
        hashes: Sequence[str] = (),
        max_new_tokens: int = 256,
        system: str | None = None,
    ) -> Iterator[tuple[str, str]]:
        """Yield both answers as they grow, one piece of each in turn, so that the faster model is not recognizable.

        Input is checked at the call. Setting `stopped`, in any thread, or closing the iterator ends both computations.
        """
        with self._claiming:
            if self._begun:
                raise InputError("This pair of models has already answered its question. Ask the next question.")
            self._begun = True
        turn = user_turn(question, len(images))
        said = [("system", system)] if system else []
        self._turns = tuple(
            {"role": role, "content": text} for role, text in [*said, (turn.role, ask(question, len(images)))]
        )
        self._question, self._hashes = question, tuple(hashes)
        conversation = Conversation(turns=(turn,), system=system)
        streams = {
            side: contender.chat.reply(
                conversation,
                images,
                max_new_tokens=max_new_tokens,
                temperature=contender.temperature,
                seed=self.seed,
                stop=self.stopped,
            )
            for side, contender in self.contenders.items()
        }
        return self._grow(streams)

    def _grow(self, streams: dict[Side, Iterator[str]]) -> Iterator[tuple[str, str]]:
        with closing(streams["left"]), closing(streams["right"]):  # type: ignore[type-var]  # they are generators
            running = dict(streams)
            while running and not self.stopped.is_set():
                for side in list(running):
                    piece = next(running[side], None)
                    if piece is None:
                        del running[side]
                    else:
                        self.answers[side] += piece
                yield self.answers["left"], self.answers["right"]
        self.whole = not running and not self.stopped.is_set()

    def vote(self, verdict: Verdict, rater: str) -> Vote:
        """Return the vote as a record of the file; allowed once, when both answers are complete."""
        if not self.whole:
            raise InputError("You can vote when both answers are complete. Ask the question again.")
        with self._claiming:
            if self.voted:
                raise InputError("This pair of answers already has a vote. Ask the next question.")
            self.voted = True
        return Vote(
            id=uuid.uuid4().hex,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            question=self._question,
            pictures=self._hashes,
            conversation=self._turns,
            answers=dict(self.answers),
            models={side: contender.name for side, contender in self.contenders.items()},
            vote=verdict,
            rater=rater,
            seed=self.seed,
        )
