"""Votes of people on two answers to one question: a file that is only ever appended to, one JSON object a line.

    {"id": "5f0c...", "time": "2026-11-23T19:40:02+00:00", "question": "What colour is it?", "pictures": ["9b1d..."],
     "conversation": [{"role": "user", "content": "<image>\\nWhat colour is it?"}],
     "answers": {"left": "Red.", "right": "Blue."}, "models": {"left": "nano", "right": "merged"},
     "vote": "left", "rater": "anna", "seed": 81724}

A line is written in one piece and flushed to the disk before the vote is called saved. What a crash in the middle of a
line leaves is cut off when the file is next opened for writing; the lines before it are never touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from qllava.config import InputError

Choice: TypeAlias = Literal["left", "right", "tie", "both_bad"]
Side: TypeAlias = Literal["left", "right"]
CHOICES: tuple[Choice, ...] = get_args(Choice)


@dataclass(frozen=True)
class Vote:
    """One judgement of one person."""

    id: str
    time: str  # ISO 8601, with its zone
    question: str
    pictures: tuple[str, ...]  # SHA-256 of each picture's file, as `--keep-pictures` would keep it
    conversation: tuple[dict[str, str], ...]  # what both models were asked: role and content
    answers: dict[Side, str]
    models: dict[Side, str]  # names, with the temperature where it is not 0
    vote: Choice
    rater: str
    seed: int  # of the sides and, above temperature 0, of the answers


class VoteFile:
    """The file of one process. Raises InputError when it cannot be written, or holds something else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _end_last_line(path)
            self.votes = read_votes(path)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); choose another place.") from error

    def append(self, vote: Vote) -> None:
        """Add a vote; it is on the disk when this returns. Raises InputError when it is not."""
        line = json.dumps(asdict(vote), ensure_ascii=False) + "\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode())
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"The vote could not be saved ({error.strerror}); it was not counted.") from error
        self.votes.append(vote)


def read_votes(path: Path) -> list[Vote]:
    """The votes of a file. Raises InputError that names the first line that is none."""
    return [_vote(line, f"{path}, line {number}") for number, line in enumerate(_lines(path), 1) if line.strip()]


@dataclass(frozen=True)
class Tally:
    """How two models stand: votes for each, and without a winner."""

    names: tuple[str, str]
    wins: tuple[int, int]
    ties: int
    both_bad: int


def tally(votes: Sequence[Vote], names: tuple[str, str]) -> Tally:
    """Count the votes between two models, whichever side each stood on."""
    between = [vote for vote in votes if {vote.models["left"], vote.models["right"]} == set(names)]
    winners = [vote.models[vote.vote] for vote in between if vote.vote in ("left", "right")]
    return Tally(
        names=names,
        wins=(winners.count(names[0]), winners.count(names[1])),
        ties=sum(vote.vote == "tie" for vote in between),
        both_bad=sum(vote.vote == "both_bad" for vote in between),
    )


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _vote(line: str, where: str) -> Vote:
    try:
        row: Any = json.loads(line)
    except ValueError:
        row = None
    names = {field.name for field in fields(Vote)} - {"conversation"}  # files of other tools may lack it
    if not isinstance(row, dict) or not names <= row.keys() or row["vote"] not in CHOICES:
        raise InputError(f"{where}: this is no vote, which has {', '.join(sorted(names))}; repair or remove the line.")
    if not all(isinstance(row[key], dict) and row[key].keys() == {"left", "right"} for key in ("answers", "models")):
        raise InputError(f"{where}: answers and models need a left and a right each; repair or remove the line.")
    known = {name: row[name] for name in names} | {"conversation": tuple(row.get("conversation") or ())}
    return Vote(**{**known, "pictures": tuple(row["pictures"])})


def _end_last_line(path: Path) -> None:
    """Cut off a last line that was not written to its end; end one that lacks its line break only."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        if not content or content.endswith(b"\n"):
            return
        begun = content[content.rfind(b"\n") + 1 :]
        try:
            json.loads(begun)
        except ValueError:
            file.truncate(len(content) - len(begun))
            return
        file.write(b"\n")
