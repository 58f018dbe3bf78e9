r"""ScienceQA (Lu et al. 2022): school questions with up to five choices, half of them with an image.

    qllava eval scienceqa --problems problems.json --answers answers.jsonl
    qllava eval scienceqa --problems problems.json --model MODEL --image-folder images --order reason-first \
        --out answers.jsonl

The problems are in the original format, one JSON object from id to problem. A letter is read from an answer only by the
rules of the LLaVA papers; an answer that they do not cover counts as unparsed and as wrong:

    C                                          a bare letter, A to E
    C. Dover                                   a letter, a full stop and a space at the start
    ... Dover. The answer is C.                "The answer is X" and one more character, exactly once

The third rule accepts any character after the letter, as the released scorer does, because the full stop in its pattern
is a wildcard: "The answer is C, because ..." is read, and so is the D of "The answer is Dover". "The answer is C" at
the end of a line, without a full stop, is not.

Accuracy is reported over all problems, over the problems with an image (called SQA-IMG in later papers), and by
subject, context and grade, as in the table of the first paper.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from qllava.config import InputError
from qllava.conversation import Conversation, Turn, ask
from qllava.data.records import is_folder
from qllava.evaluation.answers import answered_before, append_answers, read_answers
from qllava.evaluation.intervals import Share

if TYPE_CHECKING:
    from qllava.inference import Chat, Room

Order = Literal["answer-first", "reason-first"]
LETTERS = string.ascii_uppercase[:5]
REASON_TOKENS = 512  # enough for lecture and solution of the longest problem
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
NO_IMAGES = "none of the problems has an image"
GROUPS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")

_STATED = re.compile(r"The answer is ([A-Z]).")  # any character, as in the released scorer
_INSTRUCTION: dict[str, str] = {
    "answer-first": "Begin with the words `The answer is X.`, X being the letter of the right option, then say why.",
    "reason-first": "Reason first, then end with the words `The answer is X.`, X being the letter of the right option.",
}


@dataclass(frozen=True)
class ScienceProblem:
    """One problem of ScienceQA."""

    id: str
    """Id of the problem."""
    question: str
    """Text of the question."""
    choices: tuple[str, ...]
    """Texts of the choices, 2 to 5."""
    answer: int
    """Index of the correct choice, from 0."""
    hint: str
    """Context in words; empty without one."""
    image: str | None
    """File name of the image in the problem's folder; None without an image."""
    subject: str
    """Subject: NAT, SOC or LAN."""
    grade: int
    """Grade from 1 to 12."""
    split: str
    """Split of the data set."""
    reason: str = ""
    """Lecture and solution, if the problem has them."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Columns of the paper's table to which the problem belongs; it may belong to both TXT and IMG."""
        context = [name for name, there in (("TXT", self.hint), ("IMG", self.image)) if there]
        return (self.subject, *(context or ["NO"]), "G1-6" if self.grade <= 6 else "G7-12")

    def words(self) -> str:
        """Return the question, its context and its options, one line each."""
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        lines = [f"Question: {self.question}", f"Context: {self.hint or 'N/A'}", f"Options: {options}"]
        return "\n".join(lines)

    def prompt(self, order: Order) -> str:
        """Return the words of the problem with the instruction in which order to answer."""
        return f"{self.words()}\n{_INSTRUCTION[order]}"

    def response(self, order: Order) -> str:
        """Return the response to learn: the correct letter, and the reason if there is one, in this order."""
        parts = [f"The answer is {LETTERS[self.answer]}.", *([self.reason] if self.reason else [])]
        return " ".join(parts if order == "answer-first" else reversed(parts))


@dataclass(frozen=True)
class ScienceResult:
    """Accuracy over problems."""

    total: Share
    """Share of correct answers over all problems."""
    with_image: Share
    """Share of correct answers over the problems with an image."""
    groups: dict[str, Share]
    """Share of correct answers by the names in GROUPS; groups without problems are left out."""
    unparsed: int
    """Number of answers from which no letter can be read, problems without an answer included."""
    unanswered: int
    """Number of problems without an answer."""
    not_a_choice: int
    """Number of answers with a letter that is not among the problem's choices; they count as wrong."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures under the names that `qllava eval scienceqa --json` uses."""
        shown = self.with_image
        reasons = {} if self.total.n else dict.fromkeys(("accuracy", "ci95"), "there are no problems")
        reasons |= {} if shown.n else dict.fromkeys(("accuracy_image", "ci95_image"), NO_IMAGES)
        return {
            "accuracy": self.total.value,
            "ci95": list(self.total.ci95) if self.total.n else None,
            "accuracy_image": shown.value,
            "ci95_image": list(shown.ci95) if shown.n else None,
            **({"undefined": reasons} if reasons else {}),
            "n": self.total.n,
            "n_image": shown.n,
            "correct": self.total.count,
            "correct_image": shown.count,
            "unparsed": self.unparsed,
            "unanswered": self.unanswered,
            "not_a_choice": self.not_a_choice,
            "groups": {
                name: {"accuracy": share.value, "n": share.n, "correct": share.count, "ci95": list(share.ci95)}
                for name, share in self.groups.items()
            },
        }

    def text(self) -> str:
        """Return the figures for the terminal, one per line."""
        image = self.with_image if self.with_image.n else f"undefined: {NO_IMAGES}"
        shares = {"all": self.total, "with an image": image, **self.groups}
        notes = [f"{self.unparsed} of {self.total.n} answers could not be read, and count as wrong."]
        if self.unanswered:
            notes.append(f"{self.unanswered} of these are missing.")
        if self.not_a_choice:
            notes.append(f"{self.not_a_choice} answers name a letter that is not among the choices of the problem.")
        return "\n".join([f"{name:<16}{share}" for name, share in shares.items()] + notes)


def read_letter(text: str) -> str | None:
    """Return the letter that the papers' rules read from an answer; None if they read none.

    >>> [read_letter(text) for text in ("C", "C. Dover", "It is Dover. The answer is C.", "Dover (C)")]
    ['C', 'C', 'C', None]
    """
    if len(text) == 1 and text in LETTERS:
        return text
    if text[1:3] == ". " and text[0] in LETTERS:
        return text[0]
    stated = _STATED.findall(text)
    return stated[0] if len(stated) == 1 else None


def read_problems(path: Path, split: str = "test") -> list[ScienceProblem]:
    """Return the problems of one split of an original `problems.json`.

    Raises:
        InputError: The file is of another kind, a problem is invalid, or the split has no problems.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its name.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}). Give the problems.json of ScienceQA.") from error
    if not isinstance(records, dict):
        raise InputError(f"{path} must be one JSON object from id to problem, as ScienceQA's problems.json is.")
    problems = [_problem(id, record, path) for id, record in records.items()]
    wanted = [problem for problem in problems if problem.split == split]
    if not wanted:
        there = ", ".join(sorted({problem.split for problem in problems})) or "none"
        raise InputError(f"{path} has no problems of the split {split!r} (it has: {there}); name one with --split.")
    return wanted


def score(problems: Sequence[ScienceProblem], answers: Mapping[str, str]) -> ScienceResult:
    """Score answers by problem id against the correct choices; answers to other problems are ignored."""
    letters = {problem.id: read_letter(answers.get(problem.id, "")) for problem in problems}
    right = {problem.id: letters[problem.id] == LETTERS[problem.answer] for problem in problems}

    def share(of: Callable[[ScienceProblem], bool]) -> Share:
        counted = [right[problem.id] for problem in problems if of(problem)]
        return Share(sum(counted), len(counted))

    groups = {name: share(lambda problem, name=name: name in problem.groups) for name in GROUPS}  # type: ignore[misc]
    read = [(problem, letter) for problem in problems if (letter := letters[problem.id]) is not None]
    return ScienceResult(
        total=share(lambda problem: True),
        with_image=share(lambda problem: problem.image is not None),
        groups={name: found for name, found in groups.items() if found.n},
        unparsed=len(problems) - len(read),
        unanswered=sum(problem.id not in answers for problem in problems),
        not_a_choice=sum(letter not in LETTERS[: len(problem.choices)] for problem, letter in read),
    )


def score_file(problems: Path, answers: Path, *, split: str = "test") -> ScienceResult:
    """Score a file of answers, for `qllava eval scienceqa --answers`.

    Raises:
        InputError: A file cannot be used, or no answer belongs to a problem of the split.
    """
    asked = read_problems(problems, split)
    given = read_answers(answers)
    if not any(problem.id in given for problem in asked):
        raise InputError(
            f"{answers} answers none of the {len(asked)} problems in {problems}. Check that both files belong to the "
            "same data set and split."
        )
    return score(asked, given)


def answer_problems(
    model: str,
    problems: Path,
    image_folder: Path | None,
    out: Path,
    order: Order,
    *,
    split: str = "test",
    batch_size: int | None = None,
    base_model: Sequence[str] = (),
) -> ScienceResult:
    """Ask the problems without an answer in `out`, append the answers, and score all; `eval scienceqa --model`.

    Args:
        model: Model to evaluate.
        problems: ScienceQA's `problems.json`.
        image_folder: Folder of the images.
        out: File of answers; answers of an interrupted run in it are kept.
        order: Order of letter and reason in an answer.
        split: Split of the data set.
        batch_size: Maximum number of problems in a batch.
        base_model: Current locations of the parts of a run's base, if they have moved.

    Raises:
        InputError: The model, a problem or an image cannot be used, or the answers in `out` are from another model or
            from other settings or questions.
    """
    from qllava.inference import MOST, Room, fingerprint_of, load

    asked = read_problems(problems, split)
    if image_folder is None and any(problem.image for problem in asked):
        raise InputError("Some problems have images; give their folder with --image-folder.")
    images = find_images(asked, image_folder or problems.parent)
    if not out.parent.is_dir():
        raise InputError(f"{out} cannot be written: the folder {out.parent} does not exist. Create it first.")
    chat = load(model, base_model=base_model)
    settings = {
        "model": chat.name, "fingerprint": fingerprint_of(chat), "order": order, "max_new_tokens": REASON_TOKENS,
    }  # fmt: skip
    hashes = {problem.id: _hash(problem.prompt(order), images.get(problem.id)) for problem in asked}
    answers = answered_before(out, settings, hashes)
    missing = [problem for problem in asked if problem.id not in answers]
    room = Room(batch_size or MOST)
    window = 2 * room.most  # problems that are sorted by length together, and written when all are answered
    with tqdm(total=len(asked), initial=len(asked) - len(missing), desc="problems", unit="q", disable=None) as bar:
        for start in range(0, len(missing), window):
            found = _ask(chat, missing[start : start + window], images, order, room, bar.update)
            append_answers(out, found, settings, hashes)
            answers |= found
    return score(asked, answers)


def training_records(problems: Sequence[ScienceProblem], image_folder: Path, order: Order) -> list[dict[str, Any]]:
    """Return problems as training examples in LLaVA's format, with the same prompts as in `answer_problems`.

    Paths of images are relative to `image_folder`.

    Raises:
        InputError: An image is missing.
    """
    images, records = find_images(problems, image_folder), []
    for problem in problems:
        shown = [images[problem.id]] if problem.id in images else []
        turns = [("human", ask(problem.prompt(order), len(shown))), ("gpt", problem.response(order))]
        said = [{"from": who, "value": value} for who, value in turns]
        image = {"image": str(shown[0].relative_to(image_folder))} if shown else {}
        records.append({"id": problem.id, **image, "conversations": said})
    return records


def find_images(problems: Sequence[ScienceProblem], folder: Path) -> dict[str, Path]:
    """Return the images by problem id: `FOLDER/ID/image.png`, or `FOLDER/test/ID/image.png` as in ScienceQA's archives.

    Raises:
        InputError: An image is missing; this is checked before the first question is asked.
    """
    found = {}
    for problem in problems:
        if problem.image is None:
            continue
        path = (folder / problem.split if is_folder(folder / problem.split) else folder) / problem.id / problem.image
        if not path.is_file():
            raise InputError(f"Problem {problem.id}: the image {path} does not exist; check --image-folder.")
        found[problem.id] = path
    return found


def _hash(words: str, image: Path | None) -> str:
    """Return a hash of the prompt and the image of a problem, 16 hexadecimal digits."""
    digest = hashlib.sha256(words.encode())
    if image is not None:
        digest.update(image.read_bytes())
    return digest.hexdigest()[:16]


def _ask(
    chat: Chat,
    problems: Sequence[ScienceProblem],
    images: Mapping[str, Path],
    order: Order,
    room: Room,
    done: Callable[[int], object],
) -> dict[str, str]:
    prompts = []
    for problem in problems:
        shown = [images[problem.id]] if problem.id in images else []
        turn = Turn("user", ask(problem.prompt(order), len(shown)))
        try:
            prompts.append(chat.prompt(Conversation((turn,)), shown))
        except InputError as error:
            raise InputError(f"Problem {problem.id}: {error}") from error
    names = [f"problem {problem.id}" for problem in problems]
    said = chat.complete(prompts, max_new_tokens=REASON_TOKENS, room=room, names=names, done=done)
    return {problem.id: text for problem, text in zip(problems, said, strict=True)}


def _problem(id: str, record: Any, path: Path) -> ScienceProblem:
    """Check one problem; optional keys (lecture, solution, topic) may be missing."""
    if not isinstance(record, dict):
        raise InputError(f"{path}, problem {id}: expected an object with question, choices and answer.")

    def text(key: str) -> str:
        if not isinstance(record.get(key), str):
            raise InputError(f"{path}, problem {id}: expected a text under {key!r}; write it there.")
        return str(record[key])

    choices, answer, image = record.get("choices"), record.get("answer"), record.get("image")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise InputError(f"{path}, problem {id}: expected a list of texts under 'choices'; write it there.")
    if not 2 <= len(choices) <= len(LETTERS):
        raise InputError(f"{path}, problem {id}: {len(choices)} choices; expected 2 to {len(LETTERS)}.")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise InputError(f"{path}, problem {id}: 'answer' must be the index of the correct choice, from 0.")
    if image is not None and (not isinstance(image, str) or Path(id, image).parts != (id, image)):
        raise InputError(f"{path}, problem {id}: 'image' must be null or the name of a file in the problem's folder.")
    subject, grade = text("subject"), text("grade")
    if subject not in SUBJECTS:
        raise InputError(f"{path}, problem {id}: the subject is {subject!r}; expected {', '.join(SUBJECTS)}.")
    if not re.fullmatch(r"grade([1-9]|1[0-2])", grade):
        raise InputError(f"{path}, problem {id}: the grade is {grade!r}; expected grade1 to grade12.")
    return ScienceProblem(
        id,
        text("question"),
        tuple(choices),
        answer,
        text("hint"),
        image,
        SUBJECTS[subject],
        int(grade[5:]),
        text("split"),
        " ".join(part for key in ("lecture", "solution") if isinstance(part := record.get(key), str) and part),
    )
