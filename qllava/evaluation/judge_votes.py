"""Votes of a judge on the pairs of answers that people voted on, in both orders.

    qllava eval judge --votes votes.jsonl --judge NAME --base-url http://127.0.0.1:8000/v1 --out judgments.jsonl
    qllava eval agreement --votes votes.jsonl --judgments judgments.jsonl

The judge sees the images themselves if they were kept (`--pictures`, the folder of the demo's --keep-pictures, in which
the name of an image begins with its hash). Otherwise it reads their captions and boxes (`--contexts`, whose ids are the
hashes). Otherwise it knows nothing of the images, and the vote is counted as blind.
"""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from qllava.config import InputError
from qllava.data.contexts import read_contexts
from qllava.evaluation.asking import Answered, Judge, json_object, write_lines
from qllava.evaluation.judgments import ORDERS, JudgeOrder, Judgment
from qllava.voting.votes import Verdict, Vote, read_votes

PROMPT = (
    "Two assistants have answered a question, mostly about pictures. You see the pictures, or a context says in words "
    "what they show, or you know nothing of them. Decide which answer is better: more accurate first, then more "
    "helpful. Which answer stands first means nothing, and neither does its length alone. Say tie where both are about "
    "as good, and both_bad where both are wrong or useless. Reply with one JSON object and nothing else: "
    '{"verdict": "first" or "second" or "tie" or "both_bad", "reason": "a sentence or two"}'
)


@dataclass(frozen=True)
class Voted:
    """Judgments of a judge on a file of votes."""

    judgments: tuple[Judgment, ...]
    """Judgments, two for each vote, in the order of ORDERS."""
    votes: int
    """Number of votes."""
    blind: int
    """Number of votes about images of which the judge had neither the image nor a context."""
    answered: Answered
    """Replies of the judge."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures of `qllava eval judge --votes --json`; `failed` counts replies without a verdict."""
        pairs = list(zip(self.judgments[::2], self.judgments[1::2], strict=True))
        both = [(one.vote, other.vote) for one, other in pairs if one.vote is not None and other.vote is not None]
        return {
            "n": self.votes,
            "failed": sum(judgment.vote is None for judgment in self.judgments),
            "inconsistent": sum(one != other for one, other in both),
            "blind": self.blind,
            "judge": self.answered.to_json(),
        }

    def text(self) -> str:
        """Return the figures for the terminal."""
        found = self.to_json()
        cost = found["judge"]
        return "\n".join(
            [
                f"{cost['name']} judged {found['n']} votes in both orders: {cost['calls']} calls, "
                f"{cost['prompt_tokens']:,} prompt tokens, {cost['completion_tokens']:,} completion tokens.",
                f"{found['inconsistent']} verdicts changed with the order, {found['failed']} replies had no verdict.",
                *([f"For {self.blind} votes the judge knew nothing of the images."] if self.blind else []),
                "Next command: qllava eval agreement",
            ]
        )


def vote_on_file(votes: Path, judge: Judge, out: Path, *, contexts: Path | None, pictures: Path | None) -> Voted:
    """Ask the judge about every vote and write the judgments to `out`, for `qllava eval judge --votes`.

    Args:
        votes: File of people's votes.
        judge: Judge to ask.
        out: File for the judgments.
        contexts: File of the images' captions and boxes.
        pictures: Folder of the images.

    Raises:
        InputError: A file cannot be read or written, or no call can succeed.
    """
    given = read_votes(votes)
    if not out.parent.is_dir():
        raise InputError(f"{out} cannot be written: the folder {out.parent} does not exist. Create it first.")
    if pictures is not None and not pictures.is_dir():
        raise InputError(
            f"The folder {pictures} does not exist; give the folder that you passed to the demo with --keep-pictures."
        )
    known = {context.id: context.text for context in read_contexts(contexts)} if contexts else {}
    kept = {path.stem: path for path in sorted(pictures.iterdir()) if path.is_file()} if pictures else {}
    calls, blind = [], 0
    for vote in given:
        seen = [kept[name] for name in vote.pictures if name in kept]
        told = [known[name] for name in vote.pictures if name in known]
        images = [_data_uri(path) for path in seen] if len(seen) == len(vote.pictures) else []
        blind += bool(vote.pictures) and not images and len(told) < len(vote.pictures)
        calls += [judge.call(PROMPT, _words(vote, order, [] if images else told), images) for order in ORDERS]
    answered = judge.ask(calls)
    keys = [(vote.id, order) for vote in given for order in ORDERS]
    judgments = tuple(
        Judgment(id, order, None if text is None else read_verdict(text, order), judge.name, text or "")
        for (id, order), text in zip(keys, answered.texts(), strict=True)
    )
    write_lines(out, [judgment.to_json() for judgment in judgments])
    return Voted(judgments, len(given), blind, answered)


def read_verdict(text: str, order: JudgeOrder) -> Verdict | None:
    """Return the verdict of a reply, as a side of the vote; None if the reply has no verdict.

    >>> read_verdict('{"verdict": "first"}', "right-first"), read_verdict("The first.", "right-first")
    ('right', None)
    """
    found = json_object(text, {"verdict"})
    said = None if found is None else found["verdict"]
    left = "first" if order == "left-first" else "second"
    if said in ("first", "second"):
        return "left" if said == left else "right"
    return next((verdict for verdict in get_args(Verdict)[2:] if verdict == said), None)


def _words(vote: Vote, order: JudgeOrder, told: Sequence[str]) -> str:
    left, right = vote.answers["left"], vote.answers["right"]
    first, second = (left, right) if order == "left-first" else (right, left)
    parts = [f"[Context]\n{context}" for context in told]
    if vote.context:
        parts.append(f"[Said before]\n{vote.context}")
    parts += [f"[Question]\n{vote.question}", f"[First answer]\n{first}", f"[Second answer]\n{second}"]
    return "\n\n".join(parts)


def _data_uri(path: Path) -> str:
    try:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Repair the file, or omit --pictures.") from error
    return f"data:{mimetypes.guess_type(path.name)[0] or 'image/png'};base64,{data}"
