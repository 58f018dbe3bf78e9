"""What ablations on nano need beside nano's own files: fewer examples, and answers with their reasons in both orders.

They are made once into the cache folder, beside nano's images, which they name:

    short.json            every fifth example of nano's training examples
    answer-first.json     "The answer is red. There is a large red circle at the top."
    reason-first.json     "There is a large red circle at the top. The answer is red."
    test.json             nano's test questions, each with the request for its reason

Both orders are about the same images, ask the same questions (in anyone's words, as nano's test questions are) and say
the same words. The LLaMA has read reasons
before answers in its texts, though in other words than these.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from qllava.config import cache_folder
from qllava.files import whole_folder
from qllava.nano import dataset, language, talk

VERSION = 2
"""Raised whenever the files would come out different."""
EVERY = 5
"""One example of so many is kept."""
IMAGES = 1_400
"""How many images are asked about with reasons."""
QUESTIONS_PER_IMAGE = 5
ANSWER = "The answer is {}."


def prepare() -> Path:
    """Make the files, unless they exist, and return their folder; the images are in the folder of `dataset.prepare`."""
    nano = dataset.prepare()
    folder = cache_folder() / f"nano-{dataset.VERSION}-orders-{VERSION}"
    if folder.is_dir():
        return folder
    with whole_folder(folder, Path.is_dir) as aside:
        records = json.loads(nano.train.read_text(encoding="utf-8"))
        files = {"short": records[::EVERY]}
        for name, reason_first in (("answer-first", False), ("reason-first", True)):
            files[name] = [reasoned_record(f"train-{i:06d}", reason_first=reason_first) for i in range(IMAGES)]
        test = json.loads(nano.test.read_text(encoding="utf-8"))
        files["test"] = [{**record, "question": ask(record["question"])} for record in test]
        for name, wanted in files.items():
            (aside / f"{name}.json").write_text(json.dumps(wanted), encoding="utf-8")
    return folder


def ask(question: str) -> str:
    """Return a question that asks for its reason."""
    return f"{question}{'' if question[-1] in '?.!' else '?'} Say why."


def reasoned_record(id_: str, *, reason_first: bool) -> dict[str, Any]:
    """Return a conversation about a training image with a reason for every answer; both orders ask the same."""
    turns: list[dict[str, str]] = []
    rng = random.Random(f"orders-{id_}")
    for question in language.questions(dataset.scene_of(id_), rng, QUESTIONS_PER_IMAGE):
        mark = "" if turns else "<image>\n"
        parts = [ANSWER.format(question.answer), question.reason]
        turns.append({"from": "human", "value": f"{mark}{ask(talk.said(question.text, rng))}"})
        turns.append({"from": "gpt", "value": " ".join(reversed(parts) if reason_first else parts)})
    return {"id": id_, "image": f"images/{id_}.png", "conversations": turns}
