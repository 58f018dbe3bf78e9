"""Visual questions with one right answer: exact match after the usual VQA normalization.

Run it with `qllava eval vqa MODEL DATA`. A row of the data is LLaVA JSON (the last answer is the truth, the
conversation up to the last question is the prompt) or `{"question", "image", "answer", "type"}`.

The normalization is the one of the VQA challenge (Antol et al. 2015, and its evaluation code): lower case, no
punctuation and articles, number words as digits, contractions with their apostrophe.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qllava.config import InputError
from qllava.conversation import IMAGE_TOKEN, Conversation
from qllava.data.formats import Example, read_examples
from qllava.evaluation.intervals import wilson
from qllava.inference import Chat, load

ANSWER_TOKENS = 64  # a short answer never needs more; one that runs on is wrong anyway

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in re.split(
        r"\s+",
        """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how's i'm
        i've isn't it'd it'll let's mightn't might've mustn't must've needn't oughtn't shan't she's should've shouldn't
        somebody's someone's something's that'd that's there'd there's they'd they'll they're they've wasn't we've
        weren't what'll what're what's what've when's where'd where's who'd who'll who's why'd why's won't would've
        wouldn't y'all you'd you'll you're you've""",
    )
}

AnswerFn = Callable[[Sequence[Example]], Sequence[str]]


@dataclass(frozen=True)
class VqaResult:
    """A score over `n` questions, and what was answered."""

    accuracy: float  # between 0 and 1
    n: int
    correct: int
    ci95: tuple[float, float]  # Wilson's interval for the accuracy
    by_type: dict[str, float]  # accuracy per question type, for the questions that have one
    answers: tuple[str, ...]  # in the order of the examples, as the model wrote them

    def to_json(self) -> dict[str, Any]:
        """The figures, under the names that `qllava eval vqa --json` promises."""
        return {
            "accuracy": self.accuracy,
            "n": self.n,
            "correct": self.correct,
            "ci95": list(self.ci95),
            "by_type": self.by_type,
        }


def normalize(text: str) -> str:
    """An answer in the form in which two answers are compared.

    >>> normalize("The two red-balls!")
    '2 red balls'
    >>> normalize("A"), normalize("+")  # what is nothing but articles or signs stays: it may be a choice's letter
    ('a', '+')
    """
    text = text.lower().replace("\u2019", "'").strip()
    plain = re.sub(r"(?<=\d),(?=\d)", "", text)  # 1,000
    plain = re.sub(r"\.(?!\d)", "", plain)  # the end of a sentence, not 3.5
    plain = re.sub(r"""[;/\[\]"{}()=+\\_\-<>@`,?!]|:(?!\d)""", " ", plain)  # the challenge's list; 10:30 is a time
    words = [_CONTRACTIONS.get(word, word) for word in (raw.strip("'") for raw in plain.split())]
    words = [_NUMBERS.get(word, word) for word in words if word]
    return " ".join([word for word in words if word not in _ARTICLES] or words) or text


def is_correct(answer: str, truth: str) -> bool:
    """Exact match after `normalize`."""
    return normalize(answer) == normalize(truth)


def score(examples: Sequence[Example], answers: Sequence[str]) -> VqaResult:
    """Compare answers that were given elsewhere (during training, say) with the truth of their examples."""
    right = [is_correct(answer, truth(example)) for example, answer in zip(examples, answers, strict=True)]
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    for example, good in zip(examples, right, strict=True):
        if example.type is not None:
            groups[example.type].append(good)
    return VqaResult(
        accuracy=sum(right) / len(right) if right else 0.0,
        n=len(right),
        correct=sum(right),
        ci95=wilson(sum(right), len(right)),
        by_type={name: sum(group) / len(group) for name, group in sorted(groups.items())},
        answers=tuple(answers),
    )


def truth(example: Example) -> str:
    """The right answer: the last turn. Raises InputError when the row does not end with an answer."""
    turns = example.conversation.turns
    if len(turns) < 2 or turns[-1].role != "assistant" or turns[-2].role != "user":
        raise InputError(f"{example.where}: the row does not end with a question and its answer; add them.")
    return turns[-1].content


def question(example: Example) -> Conversation:
    """The prompt: the conversation up to and with the last question."""
    truth(example)
    return Conversation(turns=example.conversation.turns[:-1], system=example.conversation.system)


def evaluate(chat: Chat | AnswerFn, examples: Sequence[Example], *, batch_size: int = 8) -> VqaResult:
    """Ask every question greedily and score the answers.

    `chat` is a loaded model, or any function from a batch of examples to their answers (a baseline, a test). All rows
    are looked at before the first question is asked. Progress goes to stderr.
    """
    for example in examples:
        truth(example)
    ask = _asker(chat, batch_size) if isinstance(chat, Chat) else chat
    answers: list[str] = []
    # A window of several batches is sorted by length inside, so that long and short questions do not share a batch.
    window = batch_size * 8
    with tqdm(total=len(examples), desc="questions", unit="q", disable=None) as bar:
        for start in range(0, len(examples), window):
            batch = examples[start : start + window]
            answers.extend(ask(batch))
            bar.update(len(batch))
    return score(examples, answers)


def evaluate_file(
    model: str, data: Path, *, image_folder: Path | None = None, out: Path | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """`qllava eval vqa`: load, ask, score; returns the keys of its `--json`.

    With `out`, one JSON line per question: id, question, images, answer, truth, correct, type. Raises InputError for
    unreadable data, a row without an answer, a missing picture, or an `out` that cannot be written.
    """
    examples = read_examples(data, image_folder)
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out} cannot be written, because there is no folder {out.parent}; make it first.")
    result = evaluate(load(model), examples, batch_size=batch_size)
    if out is not None:
        lines = [_line(example, answer) for example, answer in zip(examples, result.answers, strict=True)]
        try:
            out.write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{out} cannot be written ({error.strerror}); choose another place.") from error
    return result.to_json()


def _asker(chat: Chat, batch_size: int) -> AnswerFn:
    def ask(examples: Sequence[Example]) -> list[str]:
        prompts = []
        for example in examples:
            try:
                prompts.append(chat.prompt(question(example), example.images))
            except InputError as error:
                raise InputError(f"{example.where}: {error}") from error
        return chat.complete(prompts, max_new_tokens=ANSWER_TOKENS, batch_size=batch_size)

    return ask


def _line(example: Example, answer: str) -> str:
    row = {
        "id": example.id,
        "question": example.conversation.turns[-2].content.replace(IMAGE_TOKEN, "").strip(),
        "images": [str(image) for image in example.images],
        "answer": answer,
        "truth": truth(example),
        "correct": is_correct(answer, truth(example)),
        "type": example.type,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"
