"""Visual question answering with one reference answer: exact match after the usual VQA normalization.

Run it with `qllava eval vqa MODEL DATA`. An example of the data is LLaVA JSON (the last answer is the reference answer,
the conversation up to the last question is the prompt) or `{"question", "image", "answer", "type"}`.

The normalization is that of the VQA challenge (Antol et al. 2015), with the same results as the challenge's evaluation
code: lower case, no punctuation and articles, number words as digits, contractions with their apostrophe. The few
differences are in docs/evaluation.md; results of the original code are in tests/evaluation/vqa_table.json.
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

from qllava import page
from qllava.config import InputError
from qllava.conversation import Conversation
from qllava.data.formats import Example, read_examples
from qllava.data.images import open_image
from qllava.evaluation.intervals import Share, wilson
from qllava.evaluation.pages import write
from qllava.evaluation.shots import Choose, Shots, last_question, with_shots
from qllava.files import write_whole
from qllava.inference import MOST, Chat, Room, fingerprint_of, load
from qllava.models.positions import positions_of

ANSWER_TOKENS = 64  # a short answer never needs more; a longer one is incorrect anyway
FAILURES_SHOWN = 200  # maximum on a page; more would make it too large to open

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _misspelled(words: str) -> dict[str, str]:
    """Return a map from each spelling that lacks one apostrophe to its contraction."""
    found = {"somebody'd": "somebodyd"}  # the original code has this entry reversed
    for word in words.split():
        found |= {word[:at] + word[at + 1 :]: word for at, sign in enumerate(word) if sign == "'"}
    return found


_SPELLED = _misspelled(_CONTRACTIONS)

AnswerFn = Callable[[Sequence[Example]], Sequence[str]]


@dataclass(frozen=True)
class VqaResult:
    """Accuracy over `n` questions, with the answers of the model."""

    accuracy: float
    """Share of correct answers, between 0 and 1."""
    n: int
    """Number of questions."""
    correct: int
    """Number of correct answers."""
    ci95: tuple[float, float]
    """Wilson's 95 % interval of the accuracy."""
    types: dict[str, Share]
    """Share of correct answers per question type, for the questions that have a type."""
    answers: tuple[str, ...]
    """Answers of the model, unchanged, in the order of the examples."""

    @property
    def by_type(self) -> dict[str, float]:
        """Accuracy per question type."""
        return {name: share.count / share.n for name, share in self.types.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the figures under the keys that `qllava eval vqa --json` writes."""
        return {
            "accuracy": self.accuracy,
            "n": self.n,
            "correct": self.correct,
            "ci95": list(self.ci95),
            "by_type": self.by_type,
            "by_type_ci95": {name: list(share.ci95) for name, share in self.types.items()},
        }


def normalize(text: str) -> str:
    """Return an answer in the form that is compared.

    >>> normalize("The two red-balls!")
    '2 red balls'
    >>> normalize("A"), normalize("+")  # a text of only articles or signs is kept: it may be the letter of a choice
    ('a', '+')
    """
    text = re.sub(r"[\n\t]", " ", text).strip()
    plain = text
    numbers = (
        re.search(r"\d,\d", text) is not None
    )  # if the text has "1,000", the original removes signs without a space
    for sign in _PUNCTUATION:
        at_edge = f"{sign} " in text or f" {sign}" in text
        plain = plain.replace(sign, "" if at_edge or numbers else " ")
    plain = re.sub(r"\.(?!\d)", "", plain).lower()  # the end of a sentence, not 3.5
    words = [_NUMBERS.get(word, word) for word in plain.split()]
    words = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_SPELLED.get(word, word) for word in words) or text


def is_correct(answer: str, truth: str) -> bool:
    """Return whether both match exactly after `normalize`."""
    return normalize(answer) == normalize(truth)


def score(examples: Sequence[Example], answers: Sequence[str]) -> VqaResult:
    """Score answers that were generated elsewhere (for example during training) against the reference answers.

    Raises:
        InputError: If there are no examples; their accuracy would be undefined, not 0.
    """
    if not examples:
        raise InputError("There are no questions to score; give examples with a question and its answer.")
    right = [is_correct(answer, truth(example)) for example, answer in zip(examples, answers, strict=True)]
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    for example, good in zip(examples, right, strict=True):
        if example.type is not None:
            groups[example.type].append(good)
    return VqaResult(
        accuracy=sum(right) / len(right),
        n=len(right),
        correct=sum(right),
        ci95=wilson(sum(right), len(right)),
        types={name: Share(sum(group), len(group)) for name, group in sorted(groups.items())},
        answers=tuple(answers),
    )


def truth(example: Example) -> str:
    """Return the reference answer of an example: its last turn.

    Raises:
        InputError: If the example does not end with a question and its answer.
    """
    turns = example.conversation.turns
    if len(turns) < 2 or turns[-1].role != "assistant" or turns[-2].role != "user":
        raise InputError(f"{example.where}: the example does not end with a question and its answer; add them.")
    return turns[-1].content


def question(example: Example) -> Conversation:
    """Return the prompt: the conversation up to and including the last question."""
    truth(example)
    return Conversation(turns=example.conversation.turns[:-1], system=example.conversation.system)


def evaluate(chat: Chat | AnswerFn, examples: Sequence[Example], *, batch_size: int = MOST) -> VqaResult:
    """Ask every question greedily and score the answers.

    All examples are checked before the first question is asked. Progress goes to stderr.

    Args:
        chat: A loaded model, or any function from a batch of examples to their answers (a baseline, a test).
        examples: Examples that end with a question and its answer.
        batch_size: Maximum number of questions in a batch; batches are smaller if memory does not suffice.
    """
    for example in examples:
        truth(example)
    answers: list[str] = []
    # A window of several batches is sorted by length inside, so that long and short questions do not share a batch.
    window = 2 * batch_size
    with tqdm(total=len(examples), desc="questions", unit="q", disable=None) as bar:
        ask = _asker(chat, batch_size, bar.update) if isinstance(chat, Chat) else chat
        for start in range(0, len(examples), window):
            batch = examples[start : start + window]
            answers.extend(ask(batch))
            if ask is chat:
                bar.update(len(batch))
    return score(examples, answers)


def evaluate_file(
    model: str,
    data: Path,
    *,
    image_folder: Path | None = None,
    out: Path | None = None,
    html: Path | None = None,
    shots: int = 0,
    pool: Path | None = None,
    choose: Choose = "random",
    seed: int = 0,
    read: str | None = None,
    batch_size: int | None = None,
    base_model: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate a model on a file, for `qllava eval vqa`; returns the keys of its `--json`.

    Args:
        model: Model to evaluate.
        data: File of the examples; the paths of their images are relative to `image_folder`.
        out: File for one JSON line per question: id, question, images, answer, truth, correct, type, fingerprint of the
            model, max_new_tokens and shots.
        html: File for a page with the failures.
        shots: Number of examples of the `pool` before each question (`choose` and `seed`: see the module `shots`).
        read: Regular expression that finds the answer in the text of the model (see `reader`); `unread` in the result
            counts the texts in which it finds none.
        base_model: Current locations of the parts of a run's base, if they have moved.

    Raises:
        InputError: Data or an image cannot be read, an example has no answer or is too long, or a write fails.
    """
    pattern = reader(read) if read is not None else None
    examples = read_examples(data, image_folder)
    drawn_from = read_examples(pool, image_folder) if pool is not None else []
    for example in (*examples, *drawn_from):
        truth(example)
    for path in (out, html):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{path} cannot be written: the folder {path.parent} does not exist. Create it first.")
    chat = load(model, base_model=base_model)
    asked = with_shots(examples, Shots(shots, drawn_from, choose, seed), chat) if shots else examples
    result = evaluate(chat, asked, batch_size=batch_size or MOST)
    said, unread = result.answers, {}
    if pattern is not None:
        found = [read_answer(pattern, answer) for answer in said]
        result, unread = score(asked, [answer or "" for answer in found]), {"unread": found.count(None)}
    if out is not None:
        by = {
            "fingerprint": fingerprint_of(chat), "max_new_tokens": ANSWER_TOKENS, "shots": shots,
            **({"choose": choose, "seed": seed} if shots else {}),
        }  # fmt: skip
        lines = [_line(*line, by) for line in zip(examples, result.answers, said, strict=True)]
        try:
            write_whole(out, "".join(lines))
        except OSError as error:
            raise InputError(f"{out} cannot be written ({error.strerror}); choose another path.") from error
    if html is not None:
        write(html, failures_page(examples, result, f"{chat.name} on {data.name}", _told(shots, choose)))
    return {**result.to_json(), **unread}


def reader(pattern: str) -> re.Pattern[str]:
    """Return the compiled pattern that finds an answer in a longer text.

    Raises:
        InputError: The pattern is not a regular expression, or does not have exactly one group.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--read {pattern!r} is not a valid regular expression ({error}). Correct it.") from error
    if compiled.groups != 1:
        raise InputError(f"--read {pattern!r} has {compiled.groups} groups; put exactly one group around the answer.")
    return compiled


def read_answer(pattern: re.Pattern[str], said: str) -> str | None:
    """Return the answer in a text; None if the pattern finds none or several, as in the rule of ScienceQA."""
    found: list[str] = pattern.findall(said)
    return found[0] if len(found) == 1 else None


def _told(shots: int, choose: Choose) -> str:
    how = {"random": "drawn at random", "text": "chosen by similar text", "picture": "chosen by similar image"}
    return f"{shots} examples before each question, {how[choose]}." if shots else "No examples before a question."


def _asker(chat: Chat, batch_size: int, done: Callable[[int], object]) -> AnswerFn:
    context = positions_of(chat.model.config.get_text_config())
    room = Room(batch_size)  # shared by all windows, so that a batch size reduced for lack of memory is kept

    def ask(examples: Sequence[Example]) -> list[str]:
        prompts = []
        for example in examples:
            try:
                prompt = chat.prompt(question(example), example.images)
            except InputError as error:
                raise InputError(f"{example.where}: {error}") from error
            # Every answer has the same maximum length, independent of its batch.
            if len(prompt.input_ids) + ANSWER_TOKENS > context:
                long = (
                    f"the question has {len(prompt.input_ids)} tokens together with the text and the images before it"
                )
                space = f"{ANSWER_TOKENS} for an answer do not fit into the {context} of this model"
                raise InputError(f"{example.where}: {long}, and {space}; give fewer --shots or a shorter example.")
            prompts.append(prompt)
        names = [f"the question at {example.where}" for example in examples]
        return chat.complete(prompts, max_new_tokens=ANSWER_TOKENS, room=room, names=names, done=done)

    return ask


def failures_page(examples: Sequence[Example], result: VqaResult, title: str, note: str) -> str:
    """Return a page with the accuracy by type, and the questions with incorrect answers and their images."""
    types = [(name, share.count / share.n, *share.ci95) for name, share in result.types.items()]
    wrong = [
        (example, answer)
        for example, answer in zip(examples, result.answers, strict=True)
        if not is_correct(answer, truth(example))
    ]
    step = max(1, -(-len(wrong) // FAILURES_SHOWN))
    shown = wrong[::step]
    cards = [
        page.card(
            page.join(page.image(open_image(path), path.name, longest=320) for path in example.images),
            page.paragraph(last_question(example)),
            page.verdicts([("answer", answer, False), ("reference answer", truth(example), None)]),
        )
        for example, answer in shown
    ]
    low, high = result.ci95
    figures = [
        ("accuracy", page.percent(result.accuracy)),
        ("95 % interval", f"{100 * low:.1f} to {page.percent(high)}"),
        ("questions", f"{result.n:,}"),
        ("failures", f"{len(wrong):,}"),
    ]
    rows = [
        [name, f"{share.count} of {share.n}", page.percent(share.count / share.n)]
        for name, share in result.types.items()
    ]
    both = page.grid(
        page.interval_chart("Accuracy", types, 0.0, 1.0), page.table(["type", "correct", "accuracy"], rows)
    )
    chart = [page.section("By type", both)] if types else []
    which = (
        "No failures"
        if not wrong
        else "All failures"
        if step == 1
        else f"{len(shown)} of {len(wrong)} failures, evenly spaced"
    )
    return page.page(title, note, [page.tiles(figures), *chart, page.section(which, page.gallery(cards))])


def _line(example: Example, answer: str, said: str, by: dict[str, Any]) -> str:
    record = {
        "id": example.id,
        "question": last_question(example),
        "images": [str(image) for image in example.images],
        "answer": answer,
        **({"said": said} if said != answer else {}),
        "truth": truth(example),
        "correct": is_correct(answer, truth(example)),
        "type": example.type,
        **by,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"
