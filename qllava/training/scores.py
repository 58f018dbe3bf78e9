"""Measurements that a run makes itself: held-out questions answered during it, and nano's table.

| record | measurement |
|---|---|
| most frequent answer | to each test question the commonest training answer to the same text, or first two words |
| blind | the trained model, each question with the image of another |
| untrained, stage 1, stage 2 | the same parts before the first step, with the projector alone trained, and with LoRA |
| unseen pairs | the trained model on shapes whose pair of colour and form no training image shows |
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from qllava.data.encode import Encoder
from qllava.data.formats import Example, read_examples
from qllava.data.images import open_image
from qllava.evaluation import vqa
from qllava.evaluation.intervals import wilson
from qllava.files import read_json, write_whole
from qllava.image_layout import ImageLayout
from qllava.inference import Room, answer_prompts
from qllava.models.assemble import Assembled
from qllava.models.lora import Lora
from qllava.nano import dataset as nano
from qllava.runs import SCORES_FILE, Run
from qllava.training.durable import processes
from qllava.training.memory import CONTEXT, PACK_SIZES, Asking, parse_bytes
from qllava.training.settings import Settings, TrainConfig, name_of

T = TypeVar("T")
MAX_ANSWER_TOKENS = 48
BASELINE = 400
"""Number of nano's test questions, the same share of every type, for which a record beside the trained model is
measured: 400 give an interval of at most 10 points, and save a tenth of the run."""
SHOWN = 12
"""Number of held-out questions whose answers a report shows, from before and after training."""


class _Pixels(Sequence[torch.Tensor | None]):
    """Images of questions as tensors, opened on access, so that a whole set is never in memory."""

    def __init__(self, examples: Sequence[Example], processor: Any) -> None:
        self.examples, self.processor = examples, processor

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        images = [open_image(path) for path in self.examples[index].images]
        return self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"] if images else None


def room_for(config: TrainConfig) -> Room:
    """Return how much memory the answers of a run may take: under `fit_memory` what the limit leaves.

    All ranks form the same batches, and a batch that was too large is not repeated in halves, because the other ranks
    may be waiting for its end.
    """
    limit = parse_bytes(config.fit_memory) if config.fit_memory else None
    if limit is not None and torch.cuda.is_available():
        limit -= CONTEXT
    return Room(limit=limit, agree=processes.lowest, halves=not processes.several())


def shown(train: TrainConfig) -> int:
    """Return how many questions the report shows with answers; 0 if the settings ask no questions."""
    return SHOWN if train.eval_questions or train.eval_questions_final else 0


def evaluates(train: TrainConfig) -> bool:
    """Return whether held-out examples are evaluated during the run, and not only at its end."""
    return name_of(train.eval_strategy) != "no"


def asking_of(train: TrainConfig, lora: Lora | None, *, held_out: bool) -> Asking:
    """Return the questions and held-out samples of a run that its memory depends on.

    Args:
        train: The loop's settings. `eval_strategy no` turns off only the evaluations during the run: at its end the
            held-out loss is computed and questions are answered nevertheless.
        lora: None for stage 1, which answers no questions.
        held_out: Whether the run has held-out examples.
    """
    if not held_out:
        return Asking()
    tokens = train.per_device_eval_batch_size * (train.max_length or PACK_SIZES[0])
    if lora is None:
        return Asking(held_out_tokens=tokens)
    # The displayed questions are answered again after training.
    during = max(train.eval_questions if evaluates(train) else 0, train.eval_questions_final, shown(train))
    return Asking(shown(train), during, MAX_ANSWER_TOKENS, tokens)


def expects_held_out(settings: Settings) -> bool:
    """Return whether a plan of these settings includes held-out examples.

    nano has its own for its own examples. A preset that evaluates leaves `eval_file` to the command line.
    """
    return bool(settings.data.eval_file) or settings.nanos_own or evaluates(settings.train)


def answers(
    model: nn.Module, assembled: Assembled, examples: Sequence[Example], room: Room, *, title: str = "Answering"
) -> list[str]:
    """Return the model's greedy answers to the last question of each example.

    Args:
        model: The model in its current state.
        assembled: Its tokenizer, image processor and template.
        examples: Examples that end with a question and its answer.
        room: Result of `room_for`; the same for all answers of a run.
        title: Label of the progress bar.
    """
    encoder = Encoder(
        assembled.processor.tokenizer,
        assembled.template,
        assembled.model.config.image_token_index,
        ImageLayout.of_config(assembled.model.config),
    )
    prompts = [encoder.encode_prompt(vqa.question(e), images=len(e.images)) for e in examples]
    pixels = _Pixels(examples, assembled.processor)
    names = [f"the question at {example.where}" for example in examples]
    hidden = None if processes.is_main() else True  # None: hidden without a terminal
    with tqdm(total=len(examples), desc=title, unit=" questions", disable=hidden, leave=False) as bar:
        return answer_prompts(
            model,
            assembled.processor.tokenizer,
            prompts,
            pixels,
            max_new_tokens=MAX_ANSWER_TOKENS,
            room=room,
            names=names,
            done=bar.update,
        )


def exact_match(model: nn.Module, assembled: Assembled, examples: Sequence[Example], room: Room) -> vqa.VqaResult:
    """Score the answers to the last question of each example, by exact match with the example's own answer."""
    return vqa.score(examples, answers(model, assembled, examples, room, title="Evaluating"))


def spaced(rows: Sequence[T], count: int) -> list[T]:
    """Return at most `count` examples, evenly spaced."""
    return list(rows[:: max(1, -(-len(rows) // count))]) if count else []


def asked(example: Example) -> str:
    """Return the last question of an example, without image tokens."""
    return vqa.question(example).turns[-1].content.replace("<image>", "").strip()


@dataclass
class Table:
    """nano's table. Measurements are stored in the run's folder, so that a resumed run keeps them."""

    folder: Path
    """The run's folder."""
    assembled: Assembled
    """Tokenizer, images and template for the questions."""
    test: list[Example]
    """Held-out questions, equally many of every type."""
    unseen: list[Example]
    """Questions about pairs of colour and shape that no training image shows."""
    room: Room
    """Memory that the answers may take."""
    found: dict[str, Any] = field(default_factory=dict)
    """Measurements so far, by the names of results.json."""

    @classmethod
    def open(cls, folder: Path, assembled: Assembled, room: Room) -> Table:
        """Create a table, or load the one in the folder."""
        data = nano.prepare()
        found = processes.by_main(partial(_kept, folder))
        test, unseen = (read_examples(file, data.folder) for file in (data.test, data.unseen))
        return cls(folder, assembled, test, unseen, room, found)

    def measure(self, name: str, model: nn.Module) -> None:
        """Answer the first `BASELINE` test questions with the model in its current state."""
        if name not in self.found:
            some = self.test[:BASELINE]  # the types take turns
            self._keep(name, vqa.score(some, self._answers(model, some, name)).accuracy)

    def finish(self, model: nn.Module) -> dict[str, Any]:
        """Measure the records that need the trained model, and return the whole table."""
        data = nano.prepare()
        result = vqa.score(self.test, self._answers(model, self.test, "stage2"))
        # A shift by half the set gives every question the image of another question, of any type.
        some, half = self.test[:BASELINE], len(self.test) // 2
        swapped = [replace(e, images=self.test[(i + half) % len(self.test)].images) for i, e in enumerate(some)]
        self.found |= {
            "stage2": result.accuracy,
            "by_type": result.by_type,
            "n": result.n,
            "ci95": list(result.ci95),
            "frequent_answer": vqa.score(
                self.test, frequent_answers(read_examples(data.train, data.folder), self.test)
            ).accuracy,
            "blind": vqa.score(some, self._answers(model, swapped, "blind")).accuracy,
            "counts": {
                **dict.fromkeys(("frequent_answer", "stage2"), len(self.test)),
                **dict.fromkeys(("blind", "untrained", "stage1"), len(some)),
                "unseen_pairs": len(self.unseen),
                "by_type": {name: share.n for name, share in result.types.items()},
            },
            "unseen_pairs": vqa.score(self.unseen, self._answers(model, self.unseen, "unseen pairs")).accuracy,
        }
        return self.found

    def _answers(self, model: nn.Module, examples: Sequence[Example], title: str) -> list[str]:
        return answers(model, self.assembled, examples, self.room, title=f"Asking: {title}")

    def _keep(self, name: str, value: float) -> None:
        self.found[name] = value
        processes.by_main(partial(write_whole, self.folder / SCORES_FILE, json.dumps(self.found)))


def _kept(folder: Path) -> dict[str, Any]:
    """Return earlier measurements; corrupt ones, or those of a start without a checkpoint, are measured again.

    Such a start may have had other settings, because nothing refuses new ones.
    """
    return (read_json(folder / SCORES_FILE) or {}) if Run(folder).state == "interrupted" else {}


def frequent_answers(train: Sequence[Example], test: Sequence[Example]) -> list[str]:
    """Return for each question the most frequent training answer to the same text, or else to its first two words."""
    exact: dict[str, Counter[str]] = defaultdict(Counter)
    begun: dict[str, Counter[str]] = defaultdict(Counter)
    for example in train:
        turns = example.conversation.turns
        for question, answer in zip(turns[::2], turns[1::2], strict=False):
            text = question.content.replace("<image>", "").strip()
            exact[text][answer.content] += 1
            begun[" ".join(text.split()[:2])][answer.content] += 1
    out = []
    for example in test:
        text = asked(example)
        counts = exact.get(text) or begun.get(" ".join(text.split()[:2])) or Counter({"": 1})
        out.append(counts.most_common(1)[0][0])
    return out


def format_table(found: dict[str, Any]) -> str:
    """Format the table for a terminal."""
    rows = [
        ("most frequent answer", "frequent_answer"),
        ("blind (another image)", "blind"),
        ("untrained", "untrained"),
        ("after stage 1", "stage1"),
        ("after stage 2", "stage2"),
        ("unseen pairs", "unseen_pairs"),
    ]
    counts = found["counts"]
    lines = ["Accuracy on held-out questions, 95 % confidence interval, number of questions"]
    lines += [_line(label, found[key], counts[key]) for label, key in rows]
    lines += ["By type, after stage 2"]
    lines += [_line(label, value, counts["by_type"][label]) for label, value in found["by_type"].items()]
    return "\n".join(lines)


def _line(label: str, share: float, n: int) -> str:
    """Format a share with its 95 % interval and the number of questions."""
    low, high = wilson(round(share * n), n)
    between = f"{100 * low:.1f}-{100 * high:.1f}"
    return f"  {label:<26}{share:>7.1%}  {between:>10}  {n:>5,}  {_bar(share)}"


def _bar(share: float) -> str:
    return "#" * round(30 * share)
