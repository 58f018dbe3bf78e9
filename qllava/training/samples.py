"""Sample answers of a run: some held-out questions, answered before its training and after it.

"Before" is the model at the start of the run's instruction tuning, with LoRA at zero:

| the run starts from | model that answers before training |
|---|---|
| an existing LLaVA | that LLaVA |
| parts and `projector` | the parts with that projector |
| parts and a stage 1 of its own (`pretrain_file`, nano) | the parts with the projector of that stage 1 |
| an adapter | the base with that adapter |

The answers are stored in the run's folder: a resumed run shows those of its first start, because the model has already
learned when it resumes. nano's table also has a record for the parts before stage 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qllava.data.formats import Example
from qllava.evaluation import vqa
from qllava.files import read_json, write_whole
from qllava.inference import Room
from qllava.models.assemble import Assembled
from qllava.runs import BEFORE_FILE, SAMPLES_FILE, Run
from qllava.training import scores
from qllava.training.durable import processes


def before(
    folder: Path, model: nn.Module, assembled: Assembled, examples: Sequence[Example], room: Room
) -> list[str | None]:
    """Return the answers from before training: those stored in the run, or the model's own, which are then stored.

    An answer is None if it cannot be known: the question is new since the run began, or training began without storing
    any.
    """
    keys = _keys(examples)
    if not processes.by_main(Run(folder).checkpoints):
        # Also if an earlier start stored some: it left no checkpoint, and may have had another projector.
        if not examples:
            return []
        answers = scores.answers(model, assembled, examples, room)
        kept = [{**key, "answer": answer} for key, answer in zip(keys, answers, strict=True)]
        processes.by_main(partial(write_whole, folder / BEFORE_FILE, json.dumps(kept, indent=1) + "\n"))
        return list(answers)
    rows = processes.by_main(partial(read_json, folder / BEFORE_FILE)) or ()
    found = {_identity(row): str(row["answer"]) for row in rows}
    return [found.get(_identity(key)) for key in keys]


def _keys(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return what identifies each question: all that the model reads, and its images relative to their common folder.

    That folder may have moved, and a file name alone may occur in several folders.
    """
    images = [path.absolute() for e in examples for path in e.images]
    root = os.path.commonpath([path.parent for path in images]) if images else ""
    return [
        {
            "question": scores.asked(e),
            "said": [e.conversation.system, *(turn.content for turn in vqa.question(e).turns)],
            "images": [path.absolute().relative_to(root).as_posix() for path in e.images],
        }
        for e in examples
    ]


def _identity(row: dict[str, Any]) -> str:
    return json.dumps([row["question"], row.get("said"), row["images"]])


def write(folder: Path, examples: Sequence[Example], before: Sequence[str | None], after: Sequence[str]) -> None:
    """Write `samples.json`, which the report shows."""
    rows = [
        {
            "image": str(e.images[0]) if e.images else None,
            "question": scores.asked(e),
            "truth": vqa.truth(e),
            "before": b,
            "after": a,
        }
        for e, b, a in zip(examples, before, after, strict=True)
    ]
    write_whole(folder / SAMPLES_FILE, json.dumps(rows, indent=1) + "\n")
