"""Ensemble of two models on ScienceQA: how much a second model helps if the first is wrong.

    qllava eval ensemble --problems problems.json --answers gpt4.jsonl --partner llava.jsonl --rule complement
    qllava eval ensemble --problems problems.json --answers llava.jsonl --partner gpt4.jsonl --rule judge --judge gpt-4

Both rules are the paper's. `complement`: the partner's answer is used if no letter can be read from the first answer.
`judge`: if the two letters differ, a language model reads the problem in words and both answers, and decides; it may
choose a third answer. It is asked twice, with the answers in both orders. If the two decisions differ, or a reply
cannot be read, no decision is made, and the first answer is kept (the partner's if the first has no letter). So a
judge that always prefers the answer it sees first changes nothing, and `seen_first` shows the bias.

The gain is the ensemble's accuracy minus the first model's on the same problems. Its interval is from a bootstrap over
problems, its p-value from McNemar's exact test (two-sided) on the problems that only one of the two answers correctly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from qllava.config import InputError
from qllava.evaluation.answers import read_answers
from qllava.evaluation.asking import Answered, Judge
from qllava.evaluation.intervals import Estimate, Share, bootstrap
from qllava.evaluation.scienceqa import (
    GROUPS,
    LETTERS,
    ScienceProblem,
    ScienceResult,
    read_letter,
    read_problems,
    score,
)

Rule = Literal["complement", "judge"]

PROMPT = (
    "Two students have answered a question of a school test. Decide for yourself which option is right; one of the "
    "students may be right, or both may be wrong. Reason briefly, then end with the words `The answer is X.`, X being "
    "the letter of the right option."
)


@dataclass(frozen=True)
class Decisions:
    """Decisions of a judge on the problems for which the two letters differ."""

    answered: Answered
    """Replies of the judge."""
    problems: tuple[str, ...]
    """Ids of the problems."""
    letters: tuple[tuple[str | None, str | None], ...]
    """Letters of the two replies to each problem: with the first model's answer shown first, and shown second."""
    unread: int
    """Number of problems with a reply that could not be read."""
    inconsistent: int
    """Number of problems for which the two orders led to different letters."""
    seen_first: Share
    """Among replies with one of the two letters, the share with the letter that was shown first."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures for `--json`; `seen_first` is about one half without bias."""
        first = {"value": self.seen_first.value, "ci95": list(self.seen_first.ci95), "n": self.seen_first.n}
        return {
            **self.answered.to_json(),
            "problems": len(self.problems),
            "unread": self.unread,
            "inconsistent": self.inconsistent,
            "seen_first": first
            if self.seen_first.n
            else {**first, "ci95": None, "undefined": "it decided for neither answer"},
        }


@dataclass(frozen=True)
class EnsembleResult:
    """Result of an ensemble and of its two members."""

    rule: Rule
    """Rule by which the answers were combined."""
    problems: tuple[ScienceProblem, ...]
    """Problems that were scored."""
    first: ScienceResult
    """Result of the first model."""
    partner: ScienceResult
    """Result of the second model."""
    ensemble: ScienceResult
    """Result of the ensemble."""
    changed: int
    """Number of problems for which the ensemble has another letter than the first model."""
    helped: tuple[str, ...]
    """Ids of the problems that the first model answers incorrectly and the ensemble correctly."""
    hurt: tuple[str, ...]
    """Ids of the problems that the first model answers correctly and the ensemble incorrectly."""
    gain: Estimate
    """Accuracy of the ensemble minus that of the first model."""
    mcnemar: float
    """P-value of McNemar's exact test."""
    decisions: Decisions | None
    """Decisions of the judge; None for the rule `complement`."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures of `qllava eval ensemble --json`."""
        counts = {
            name: {"helped": self._of(name, self.helped), "hurt": self._of(name, self.hurt)}
            for name in self.ensemble.groups
        }
        found = self.ensemble.to_json()
        found["groups"] = {name: {**group, **counts[name]} for name, group in found["groups"].items()}
        return {
            "rule": self.rule,
            **found,
            "first": self.first.to_json(),
            "partner": self.partner.to_json(),
            "changed": self.changed,
            "helped": list(self.helped),
            "hurt": list(self.hurt),
            "gain": self.gain.to_json(),
            "mcnemar_p": self.mcnemar,
            "judge": None if self.decisions is None else self.decisions.to_json(),
        }

    def text(self) -> str:
        """Return the figures for the terminal."""
        lines = [f"{name:<20}{result.total}" for name, result in self._members()]
        lines += [f"{f'{name}, image':<20}{result.with_image}" for name, result in self._members()]
        lines.append(f"gain                {self.gain}, McNemar's p = {self.mcnemar:.3g}")
        lines.append(f"{self.changed} answers changed: {len(self.helped)} helped, {len(self.hurt)} hurt, by group")
        for name in GROUPS:
            helped, hurt = self._of(name, self.helped), self._of(name, self.hurt)
            if helped or hurt:
                lines.append(f"  {name:<14}+{helped} -{hurt}")
        if self.decisions is not None:
            lines += self._judge_lines(self.decisions)
        return "\n".join(lines)

    def _members(self) -> list[tuple[str, ScienceResult]]:
        return [("first", self.first), ("partner", self.partner), ("ensemble", self.ensemble)]

    def _of(self, group: str, ids: Sequence[str]) -> int:
        there = {problem.id for problem in self.problems if group in problem.groups}
        return sum(id in there for id in ids)

    def _judge_lines(self, found: Decisions) -> list[str]:
        cost = found.answered.to_json()
        lines = [
            f"{cost['name']} was asked about {len(found.problems)} problems in both orders: {cost['prompt_tokens']:,} "
            f"prompt tokens, {cost['completion_tokens']:,} completion tokens.",
            f"{found.inconsistent} decisions changed with the order, {found.unread} could not be read; the first "
            "model's answer is kept for these.",
            f"Decisions for the answer shown first: {found.seen_first}",
        ]
        low, high = found.seen_first.ci95
        if found.seen_first.n and not low <= 0.5 <= high:
            lines.append("This judge has a position bias: its decisions depend on the order of the answers.")
        return lines


def combine_files(
    problems: Path, answers: Path, partner: Path, rule: Rule, *, judge: Judge | None = None, split: str = "test"
) -> EnsembleResult:
    """Combine the answers of two files, for `qllava eval ensemble`.

    Raises:
        InputError: A file cannot be used, or its answers do not belong to the problems.
    """
    asked = read_problems(problems, split)
    first, second = read_answers(answers), read_answers(partner)
    for path, given in ((answers, first), (partner, second)):
        if not any(problem.id in given for problem in asked):
            raise InputError(
                f"{path} answers none of the {len(asked)} problems in {problems}. Check that both files belong to the "
                "same data set and split."
            )
    return combine(asked, first, second, rule, judge)


def combine(
    problems: Sequence[ScienceProblem],
    answers: Mapping[str, str],
    partner: Mapping[str, str],
    rule: Rule,
    judge: Judge | None = None,
) -> EnsembleResult:
    """Combine the answers of two models and score the result; the rule `judge` needs a judge."""
    first = {problem.id: read_letter(answers.get(problem.id, "")) for problem in problems}
    second = {problem.id: read_letter(partner.get(problem.id, "")) for problem in problems}
    letters = {id: letter or second[id] for id, letter in first.items()}
    decisions = None
    if rule == "judge":
        if judge is None:
            raise ValueError("the rule `judge` needs a judge")
        differ = [problem for problem in problems if first[problem.id] != second[problem.id]]
        decisions = _decide(differ, answers, partner, judge)
        for id, (one, other) in zip(decisions.problems, decisions.letters, strict=True):
            if one is not None and one == other:
                letters[id] = one
    right = {problem.id: LETTERS[problem.answer] for problem in problems}
    gained = np.array([(letters[id] == right[id]) * 1.0 - (first[id] == right[id]) for id in right])
    helped, hurt = (tuple(id for id, change in zip(right, gained, strict=True) if change == sign) for sign in (1, -1))
    total = len(helped) + len(hurt)
    return EnsembleResult(
        rule=rule,
        problems=tuple(problems),
        first=score(problems, answers),
        partner=score(problems, partner),
        ensemble=score(problems, {id: f"The answer is {letter}." for id, letter in letters.items() if letter}),
        changed=sum(letters[id] != first[id] for id in right),
        helped=helped,
        hurt=hurt,
        gain=bootstrap(lambda drawn: float(gained[drawn].mean()), list(right), reason="there are no problems"),
        mcnemar=float(stats.binomtest(len(helped), total).pvalue) if total else 1.0,
        decisions=decisions,
    )


def _decide(
    problems: Sequence[ScienceProblem], answers: Mapping[str, str], partner: Mapping[str, str], judge: Judge
) -> Decisions:
    """Ask the judge about each problem in both orders."""
    pairs = [(answers.get(problem.id, ""), partner.get(problem.id, "")) for problem in problems]
    calls = [
        judge.call(PROMPT, _case(problem, *order))
        for problem, (one, other) in zip(problems, pairs, strict=True)
        for order in ((one, other), (other, one))
    ]
    answered = judge.ask(calls)
    said = [None if text is None else read_letter(text.strip()) for text in answered.texts()]
    letters = tuple(zip(said[::2], said[1::2], strict=True))
    took_first = decided = 0
    for pair, both in zip(pairs, letters, strict=True):
        one, other = map(read_letter, pair)
        for letter, shown_first in zip(both, (one, other), strict=True):
            if letter is not None and letter in (one, other):
                decided += 1
                took_first += letter == shown_first
    return Decisions(
        answered=answered,
        problems=tuple(problem.id for problem in problems),
        letters=letters,
        unread=sum(None in both for both in letters),
        inconsistent=sum(None not in both and both[0] != both[1] for both in letters),
        seen_first=Share(took_first, decided),
    )


def _case(problem: ScienceProblem, one: str, other: str) -> str:
    """Return the problem in words, followed by the two answers."""
    image = "\nThe question shows a picture, which you cannot see." if problem.image else ""
    answers = "\n\n".join(f"[Student {n}]\n{said.strip() or '(no answer)'}" for n, said in ((1, one), (2, other)))
    return f"{problem.words()}{image}\n\n{answers}"
