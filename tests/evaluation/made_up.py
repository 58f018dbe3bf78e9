"""Synthetic data in the layouts of ScienceQA and LLaVA-Bench, which may not be copied into this repository.

The code that writes the answers knows which are right, so the expected counts do not come from the scorer under test.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qllava.data.contexts import Context

NAMES = ("gpt3_cot", "llava_13b_v0", "llava_13b_lcs558k")
SUBJECTS = ("natural science", "language science", "social science")
THINGS = ("animal", "river", "sentence", "rock", "text", "planet", "best tool", "country", "plant")
PROBLEMS, UNANSWERED = 90, 8


def _problem(number: int, dice: random.Random) -> dict[str, Any]:
    choices = dice.sample(["copper", "a frog", "Lima", "a verb", "steam", "an oak", "the Moon"], dice.randint(2, 4))
    return {
        "question": f"Which {THINGS[number % len(THINGS)]} belongs to card {number}?",
        "choices": choices,
        "answer": dice.randrange(len(choices)),
        "hint": f"Card {number} was drawn." if dice.random() < 0.5 else "",
        "image": "image.png" if dice.random() < 0.5 else None,
        "task": "closed choice",
        "grade": f"grade{dice.randint(1, 12)}",
        "subject": dice.choice(SUBJECTS),
        "topic": "cards",
        "category": "Cards",
        "skill": "Read cards",
        "lecture": "Cards are drawn.",
        "solution": "It is on the card.",
        "split": "test",
    }


def _answer(row: dict[str, Any], right: bool, style: int, dice: random.Random) -> str:
    """Return a text that states a letter once, in one of the forms that models use."""
    wrong = [n for n in range(len(row["choices"])) if n != row["answer"]]
    letter = "ABCDE"[row["answer"] if right else dice.choice(wrong)]
    reason = " ".join(dice.sample(["It", "was", "drawn", "so", "and", "lies", "on", "top"], dice.randint(3, 8)))
    return (f"The answer is {letter}. BECAUSE: {reason}.", f"SOLUTION: {reason}.\nThe answer is {letter}.")[style]


def write_science(folder: Path) -> Path:
    """Write `problems.json`, three files of answers and `expected.json` in the real layout, and return the folder.

    The first file leaves some problems unanswered. The last two problems have the same text and answers, as two of the
    real ones do.
    """
    dice = random.Random(0)
    problems = {str(100 + n): _problem(n, dice) for n in range(PROBLEMS - 1)}
    last = str(100 + PROBLEMS - 2)
    problems[str(100 + PROBLEMS - 1)] = problems[last]
    rights = {
        name: {id: dice.random() < share for id in problems} for name, share in zip(NAMES, (0.7, 0.9, 0.9), strict=True)
    }
    for name, right in zip(NAMES, (True, False, True), strict=True):
        rights[name][last] = right  # the first two files differ on it
    silent = set(dice.sample(list(problems)[:-2], UNANSWERED))
    expected: dict[str, Any] = {"n": PROBLEMS, "correct": {}, "correct_image": {}, "unparsed": {}}
    expected["n_image"] = sum(row["image"] is not None for row in problems.values())
    for style, name in zip((0, 1, 1), NAMES, strict=True):
        said = {id: _answer(row, rights[name][id], style, dice) for id, row in problems.items()}
        said[str(100 + PROBLEMS - 1)] = said[last]
        rights[name][str(100 + PROBLEMS - 1)] = rights[name][last]
        if name == NAMES[0]:
            said |= dict.fromkeys(silent, "")
            rights[name] |= dict.fromkeys(silent, False)
        lines = [json.dumps({"question_id": id, "text": text}) for id, text in said.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        expected["correct"][name] = sum(rights[name].values())
        expected["correct_image"][name] = sum(rights[name][id] for id in problems if problems[id]["image"])
        expected["unparsed"][name] = len(silent) if name == NAMES[0] else 0
    (folder / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    return folder


def write_bench(contexts: Sequence[Context], folder: Path) -> dict[str, Path]:
    """Write questions and reference answers in LLaVA-Bench's layout, and return both paths by name.

    There are 30 images with three questions each; the contexts contain 15 of the images. A reference answer repeats
    captions: one, all five, or all of two images.
    """
    known = [context for context in contexts if context.boxes][:30]
    questions, answers = list[dict[str, Any]](), list[dict[str, Any]]()
    for number, context in enumerate(known):
        image = context.image if number < 15 else f"drawn-{number}.png"
        said = {
            "conv": context.captions[0],
            "detail": " ".join(context.captions),
            "complex": " ".join((*context.captions, *known[number - 1].captions)),
        }
        for category, text in said.items():
            asked = {"question_id": len(questions), "image": image, "text": f"What is to be seen in image {number}?"}
            answers.append({"question_id": len(questions), "text": text, "category": category})
            questions.append({**asked, "category": category})
    files = {"questions": folder / "questions.jsonl", "reference": folder / "reference.jsonl"}
    for path, rows in zip(files.values(), (questions, answers), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files
