"""Votes of users on two answers to one question: an append-only file with one JSON object per line.

    {"id": "5f0c...", "time": "2026-11-23T19:40:02+00:00", "question": "What colour is it?", "pictures": ["9b1d..."],
     "conversation": [{"role": "user", "content": "<image>\\nWhat colour is it?"}],
     "answers": {"left": "Red.", "right": "Blue."}, "models": {"left": "nano", "right": "merged"},
     "vote": "left", "rater": "anna", "seed": 81724}

A line is written in one piece and flushed to the disk before the vote counts as saved. An incomplete line left by a
crash is removed when the file is next opened for writing; the lines before it are never changed.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qllava.config import InputError
from qllava.data.problems import Place, Problem, RecordError
from qllava.data.records import read_records, record_id, record_text
from qllava.files import ForeignEndError, Journal

Verdict: TypeAlias = Literal["left", "right", "tie", "both_bad"]
Side: TypeAlias = Literal["left", "right"]
VERDICTS: tuple[Verdict, ...] = ("left", "tie", "right", "both_bad")
ONE_OF = "left, right, tie or both_bad"


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One vote of one user. Files of other tools may lack the keys that have a default."""

    id: str
    """Id of the vote."""
    time: str = ""
    """Time in ISO 8601, with its zone."""
    question: str
    """The question."""
    pictures: tuple[str, ...] = ()
    """SHA-256 of each image's file, as `--keep-pictures` would save it."""
    conversation: tuple[dict[str, str], ...] = ()
    """Input of both models: role and content."""
    answers: dict[Side, str]
    """Answers by side."""
    models: dict[Side, str] = field(default_factory=dict)
    """Names by side, with the temperature if it is not 0."""
    vote: Verdict
    """The user's choice."""
    rater: str | None = None
    """Name of the user; None if it is not known."""
    seed: int | None = None
    """Seed of the sides and, above temperature 0, of the answers."""

    @property
    def context(self) -> str:
        """Return the turns before the question as JSON; empty if there are none."""
        turns = self.conversation
        before = turns[:-1] if turns and turns[-1].get("role") == "user" else turns
        return json.dumps(before, ensure_ascii=False) if before else ""

    @property
    def asked(self) -> tuple[str, tuple[str, ...], str]:
        """Return the question and its images: votes that share them are not independent of each other."""
        return self.question, self.pictures, self.context


class VoteFile:
    """The file of votes of one process.

    Raises:
        InputError: The file cannot be written, or has other content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._appending = threading.Lock()
        if path.is_dir():
            raise InputError(f"{path} is a folder. Give a file for the votes.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                with self._open() as journal:
                    journal.mend()
            self.votes = read_votes(path) if path.is_file() and path.stat().st_size else []
        except ForeignEndError as error:
            raise InputError(f"{path} is not a file of votes. Give another file.") from error
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}). Give another file.") from error

    def _open(self) -> Journal:
        # Several demos may write to one file; a line that one of them is writing must not look incomplete to another.
        return Journal(self.path, begins=b'{"id": ', hold=-1)

    def append(self, vote: Vote) -> None:
        """Append a vote and flush it to the disk, or raise an InputError if that fails."""
        content = json.dumps(asdict(vote), ensure_ascii=False).encode() + b"\n"
        try:
            with self._appending, self._open() as journal:
                journal.append(content)
        except OSError as error:
            raise InputError(f"The vote could not be saved ({error.strerror}), so it was not counted.") from error
        self.votes.append(vote)


def read_votes(path: Path) -> list[Vote]:
    """Return the votes of a file.

    Raises:
        InputError: A line is not a vote, an id occurs twice, or there are no votes.
    """
    votes: dict[str, Vote] = {}
    for place, record in read_records(path):
        vote = _vote(record, place)
        if vote.id in votes:
            raise RecordError(Problem("vote twice", "another vote has this id", "keep one of them", place, vote.id))
        votes[vote.id] = vote
    if not votes:
        raise InputError(f"{path} has no votes. Collect some with the demo's --votes.")
    return list(votes.values())


@dataclass(frozen=True)
class Tally:
    """Result of two models: votes for each, and votes without a winner."""

    names: tuple[str, str]
    """Names of the models."""
    wins: tuple[int, int]
    """Votes for each model."""
    ties: int
    """Votes for equally good answers."""
    both_bad: int
    """Votes for equally bad answers."""


def tally(votes: Sequence[Vote], names: tuple[str, str]) -> Tally:
    """Count the votes between two models, whichever side they were on."""
    between = [vote for vote in votes if set(vote.models.values()) == set(names)]
    winners = [vote.models[vote.vote] for vote in between if vote.vote in ("left", "right")]
    return Tally(
        names=names,
        wins=(winners.count(names[0]), winners.count(names[1])),
        ties=sum(vote.vote == "tie" for vote in between),
        both_bad=sum(vote.vote == "both_bad" for vote in between),
    )


def _vote(record: Any, place: Place) -> Vote:
    id = record_id(record, place, "id")
    answers, pictures, rater = record.get("answers"), record.get("pictures", []), record.get("rater")
    if not isinstance(answers, dict):
        raise RecordError(Problem("no answers", "'answers' is not an object", "give it left and right", place, id))
    if not isinstance(pictures, list) or not all(isinstance(picture, str) for picture in pictures):
        raise RecordError(
            Problem("pictures", "'pictures' is not a list of texts", "give the images' hashes", place, id)
        )
    if record.get("vote") not in VERDICTS:
        raise RecordError(Problem("vote", f"the vote is {record.get('vote')!r}", f"expected {ONE_OF}", place, id))
    conversation, models, seed = record.get("conversation"), record.get("models"), record.get("seed")
    turns = conversation if isinstance(conversation, list) else []
    return Vote(
        id=id,
        time=str(record.get("time", "")),
        question=record_text(record, "question", place, id),
        pictures=tuple(pictures),
        conversation=tuple(turn for turn in turns if isinstance(turn, dict)),
        answers={"left": record_text(answers, "left", place, id), "right": record_text(answers, "right", place, id)},
        models=models if isinstance(models, dict) and set(models) == {"left", "right"} else {},
        vote=record["vote"],
        rater=None if rater in (None, "") else str(rater),
        seed=seed if isinstance(seed, int) else None,
    )
