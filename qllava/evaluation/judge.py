"""LLaVA-Bench's protocol: a judge rates an answer and a reference answer; the score is the ratio of the means.

    qllava eval judge --questions questions.jsonl --reference reference.jsonl --answers answers.jsonl \\
        --contexts contexts.jsonl --judge NAME --base-url http://127.0.0.1:8000/v1 --out ratings.jsonl

Questions are lines with {"question_id", "text", "category", "image"}; reference answers and answers are lines with
{"question_id", "text"}; contexts are those of the data engine (captions and boxes). The judge reads the context of the
question's image, the question and both answers, and gives each answer a score from 1 to 10, as one JSON object
{"first": 8, "second": 7} or as two numbers in the first line, as LLaVA-Bench's own judge does.

There are three differences from LLaVA-Bench: every question is asked in both orders and gets the mean of both, because
judges prefer a position; a reply without two scores is counted and dropped, while the original averages it as -1; and
every score has an interval from a bootstrap over images. If only one order of a question could be read, its scores are
kept: to leave the question out would change the overall score.

    relative score = 100 * mean(scores of the answers) / mean(scores of the reference)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qllava.config import InputError
from qllava.data.contexts import read_contexts
from qllava.data.records import read_records, record_id, record_text
from qllava.evaluation.answers import read_answers
from qllava.evaluation.asking import Answered, Judge, json_object, write_lines
from qllava.evaluation.intervals import Estimate, bootstrap

RatingOrder = Literal["reference-first", "answer-first"]
ORDERS: tuple[RatingOrder, ...] = ("reference-first", "answer-first")

PROMPT = (
    "Two assistants have answered a question about a picture. You do not see the picture; the context, where one is "
    "given, says what it shows: captions, then objects with their boxes as [x1, y1, x2, y2] between 0 and 1. Rate how "
    "helpful, relevant, accurate and detailed each answer is, on a scale from 1 to 10, where 10 is best. Which answer "
    "stands first means nothing, and neither does its length alone. Reply with one JSON object and nothing else: "
    '{"first": SCORE, "second": SCORE, "reason": "a sentence or two"}'
)

# Never "8/10", "8-9" or "8,5": each may be one score (out of ten, a range, a decimal comma).
_SCORE = r"(\d+(?:\.\d+)?)(?: ?/ ?10| out of 10)?"
_TWO_SCORES = re.compile(rf"{_SCORE}(?:\s*,)?\s+{_SCORE}")


@dataclass(frozen=True)
class Case:
    """One question with its two answers."""

    id: str
    """Id of the question."""
    text: str
    """Text of the question."""
    category: str
    """Category of the question."""
    image: str | None
    """Name of the image; None without one."""
    context: str
    """Captions and boxes of the image; empty without a context."""
    reference: str
    """Reference answer."""
    answer: str
    """Answer to rate."""

    def words(self, order: RatingOrder) -> str:
        """Return the text that the judge reads, with the answers in this order."""
        both = (self.reference, self.answer) if order == "reference-first" else (self.answer, self.reference)
        context = f"[Context]\n{self.context}\n\n" if self.context else ""
        return f"{context}[Question]\n{self.text}\n\n[First answer]\n{both[0]}\n\n[Second answer]\n{both[1]}"


@dataclass(frozen=True)
class Rating:
    """Scores of one question in both orders."""

    case: Case
    """Question with its answers."""
    reference_first: tuple[float, float] | None
    """Scores of (reference, answer) with the reference first; None if the reply has no two scores."""
    answer_first: tuple[float, float] | None
    """Scores of (reference, answer) with the answer first; None if the reply has no two scores."""

    @property
    def scores(self) -> tuple[float, float] | None:
        """Scores of (reference, answer), each the mean over the orders that could be read; None if none could."""
        read = [scores for scores in (self.reference_first, self.answer_first) if scores is not None]
        if not read:
            return None
        return sum(one for one, _ in read) / len(read), sum(other for _, other in read) / len(read)

    @property
    def first_place(self) -> float | None:
        """Points that an answer gains from the first position: half of the difference between the orders."""
        if self.reference_first is None or self.answer_first is None:
            return None
        one, other = self.reference_first, self.answer_first
        return ((one[0] - one[1]) + (other[1] - other[0])) / 2


@dataclass(frozen=True)
class Scores:
    """Relative score of some questions."""

    n: int
    """Number of questions with scores."""
    relative: Estimate
    """Relative score."""
    reference: float | None
    """Mean score of the reference answers; None without questions."""
    answer: float | None
    """Mean score of the answers; None without questions."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures for `--json`."""
        found = self.relative.to_json()
        return {
            "relative_score": found.pop("value"),
            **found,
            "n": self.n,
            "mean_reference": self.reference,
            "mean_answer": self.answer,
        }


@dataclass(frozen=True)
class JudgeResult:
    """Ratings of a judge, and the scores computed from them."""

    total: Scores
    """Scores over all questions."""
    categories: dict[str, Scores]
    """Scores by category."""
    failed: int
    """Number of replies without two scores."""
    one_order: int
    """Number of questions with one reply that could be read."""
    left_out: int
    """Number of questions without a reply that could be read."""
    without_context: int
    """Number of questions for which the judge had no context of the image."""
    first_place: Estimate
    """Points that an answer gains from the first position; 0 without bias."""
    ratings: tuple[Rating, ...]
    """Ratings of all questions."""
    answered: Answered
    """Replies of the judge."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures under the names that `qllava eval judge --json` uses."""
        return {
            **self.total.to_json(),
            "by_category": {name: scores.to_json() for name, scores in self.categories.items()},
            "failed": self.failed,
            "one_order": self.one_order,
            "left_out": self.left_out,
            "without_context": self.without_context,
            "first_place": self.first_place.to_json(),
            "judge": self.answered.to_json(),
        }

    def text(self) -> str:
        """Return the figures for the terminal."""
        cost = self.answered.to_json()
        lines = [f"{name:<16}{_said(found)}" for name, found in {"all": self.total, **self.categories}.items()]
        lines.append(f"The first position is worth {self.first_place} points (0 without bias).")
        if self.failed:
            lines.append(
                f"{self.failed} of {2 * len(self.ratings)} replies could not be read: {self.one_order} questions have "
                f"the scores of one order only, {self.left_out} are left out."
            )
        if self.without_context:
            lines.append(f"For {self.without_context} questions the judge had no captions or boxes of the image.")
        lines.append(
            f"Judge: {cost['name']}, {cost['calls']} calls, {cost['prompt_tokens']:,} prompt tokens, "
            f"{cost['completion_tokens']:,} completion tokens."
        )
        return "\n".join(lines)


def judge_files(
    questions: Path, reference: Path, answers: Path, contexts: Path | None, judge: Judge, out: Path
) -> JudgeResult:
    """Ask the judge, write every reply to `out`, and score, for `qllava eval judge --questions`.

    Raises:
        InputError: A file cannot be used, the files do not belong to each other, or no call can succeed.
    """
    cases = read_cases(questions, reference, answers, contexts)
    if not out.parent.is_dir():
        raise InputError(f"{out} cannot be written: the folder {out.parent} does not exist. Create it first.")
    result = rate(cases, judge)
    write_lines(out, _lines(result))
    return result


def read_cases(questions: Path, reference: Path, answers: Path, contexts: Path | None) -> list[Case]:
    """Return the questions with their contexts and answers.

    Raises:
        InputError: A file cannot be used, or a question has no reference answer or no answer.
    """
    given = {"reference": read_answers(reference), "answer": read_answers(answers)}
    known = {context.image: context.text for context in read_contexts(contexts)} if contexts else {}
    cases: dict[str, Case] = {}
    for place, row in read_records(questions):
        id = record_id(row, place, "question_id")
        for (what, texts), path in zip(given.items(), (reference, answers), strict=True):
            if id not in texts:
                raise InputError(f"{path} has no {what} to question {id} of {questions}; add it.")
        if id in cases:
            raise InputError(f"{place}, id {id}: another question has the same id. Give each question its own id.")
        image = row.get("image")
        cases[id] = Case(
            id=id,
            text=record_text(row, "text", place, id),
            category=str(row.get("category", "all")),
            image=None if image is None else str(image),
            context=known.get(str(image), ""),
            reference=given["reference"][id],
            answer=given["answer"][id],
        )
    if not cases:
        raise InputError(f"{questions} has no questions. Write lines with question_id and text.")
    return list(cases.values())


def rate(cases: Sequence[Case], judge: Judge) -> JudgeResult:
    """Ask the judge about every case in both orders.

    Raises:
        InputError: No call can succeed.
    """
    answered = judge.ask([judge.call(PROMPT, case.words(order)) for case in cases for order in ORDERS])
    said = [None if text is None else read_scores(text) for text in answered.texts()]
    ratings = tuple(
        Rating(case, first, None if second is None else (second[1], second[0]))
        for case, first, second in zip(cases, said[::2], said[1::2], strict=True)
    )
    read = [rating for rating in ratings if rating.scores is not None]
    names = dict.fromkeys(case.category for case in cases)
    both = [rating for rating in read if rating.first_place is not None]
    places = np.array([rating.first_place for rating in both])
    return JudgeResult(
        total=_scores(read),
        categories={name: _scores([rating for rating in read if rating.case.category == name]) for name in names},
        failed=sum(scores is None for scores in said),
        one_order=len(read) - len(both),
        left_out=len(ratings) - len(read),
        without_context=sum(not case.context for case in cases),
        first_place=bootstrap(lambda drawn: float(places[drawn].mean()), _images(both), reason=""),
        ratings=ratings,
        answered=answered,
    )


def read_scores(text: str) -> tuple[float, float] | None:
    """Return the two scores of a reply, in the order of the answers; None unless there are two from 1 to 10.

    A score may be written as "8/10" or "8 out of 10", which is one score, not two.

    >>> [read_scores(text) for text in ('{"first": 8, "second": 7.5, "reason": "-"}', "8 7\\nThe first ...", "8/10")]
    [(8.0, 7.5), (8.0, 7.0), None]
    """
    found = json_object(text, {"first", "second"})
    if found is not None:
        both: list[Any] = [found["first"], found["second"]]
    else:
        numbers = _TWO_SCORES.fullmatch(text.strip().partition("\n")[0])
        both = [float(number) for number in numbers.groups()] if numbers else []
    if len(both) != 2 or not all(isinstance(n, int | float) and not isinstance(n, bool) and 1 <= n <= 10 for n in both):
        return None
    return float(both[0]), float(both[1])


def _scores(ratings: Sequence[Rating]) -> Scores:
    both = np.array([rating.scores for rating in ratings], dtype=np.float64).reshape(-1, 2)

    def relative(drawn: np.ndarray) -> float:
        reference, answer = both[drawn].sum(0)
        return float(100 * answer / reference)

    estimate = bootstrap(relative, _images(ratings), reason="")
    means = [float(mean) for mean in both.mean(0)] if len(both) else [None, None]
    return Scores(len(both), estimate, means[0], means[1])


def _images(ratings: Sequence[Rating]) -> list[str]:
    """Return the cluster of each rating for the bootstrap: questions about the same image are drawn together."""
    return [f"image {rating.case.image}" if rating.case.image else f"question {rating.case.id}" for rating in ratings]


def _lines(result: JudgeResult) -> list[dict[str, Any]]:
    """Return a record for each question and order."""
    lines = []
    calls = iter(zip(result.answered.calls, result.answered.replies, strict=True))
    for rating in result.ratings:
        for order, scores in zip(ORDERS, (rating.reference_first, rating.answer_first), strict=True):
            call, reply = next(calls)
            lines.append(
                {
                    "question_id": rating.case.id,
                    "category": rating.case.category,
                    "order": order,
                    "reference": None if scores is None else scores[0],
                    "answer": None if scores is None else scores[1],
                    "judge": call.model,
                    "reply": None if reply is None else reply.text,
                    "prompt_tokens": None if reply is None else reply.prompt_tokens,
                    "completion_tokens": None if reply is None else reply.completion_tokens,
                }
            )
    return lines


def _said(found: Scores) -> str:
    if found.relative.value is None:
        return f"undefined: {found.relative.undefined}"
    interval = found.relative.ci95
    span = f"95 % interval {interval[0]:.1f} to {interval[1]:.1f}" if interval else str(found.relative.undefined)
    return f"{found.relative.value:5.1f}  ({span}; {found.n} questions)"
