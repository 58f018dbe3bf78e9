"""A reader who types the commands of a docs page from top to bottom, in one folder that has only the clone at first.

The commands are those of the page, word for word, with three exceptions: names of models on the hub are replaced by
tiny models on this disk (`names` of Reader, and `parts` for those that a preset names), trainings run for two steps
(`FEW_STEPS`), and a server that a page names by its address is a server of the tests.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qllava.nano import dataset as nano
from tests.llm.server import Request, Said
from tests.synthesis.teaching import good, read_lines, write_contexts
from tests.tiny_models import make_image, make_tiny_records

ROOT = Path(__file__).resolve().parents[1]
FEW_STEPS = [
    "--max_steps", "2", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--save_steps", "2",
    "--eval_questions", "2", "--lora_r", "4", "--lora_alpha", "8",
]  # fmt: skip
NANO_IS_SMALL = {
    "PRETRAIN_IMAGES": 12, "TRAIN_IMAGES": 16, "NAMELESS_IMAGES": 4, "QUESTIONS_PER_IMAGE": 4,
    "VALIDATION_QUESTIONS": 8, "TEST_QUESTIONS": 16, "UNSEEN_QUESTIONS": 8,
}  # fmt: skip
TRIED = (8192, 2048)
"""Pack lengths that `fit` tries, instead of all seven, because each takes seconds."""
LCS = "blip_laion_cc_sbu_558k.json"
NOT_RUN = {
    "hf ": "downloads from a hub",
    "pip install": "needs a network",
    "sbatch ": "needs SLURM",
    "sky ": "needs a cloud",
    "ray ": "needs a cluster",
    "torchrun ": "starts processes; tests/distributed does",
    "vllm ": "another program's",
    "transformers serve": "another program's",
    "curl ": "asks another program's server",
    "llama-": "another program's",
    "cd gguf && ollama": "another program's",
    "python -m lmms_eval": "another program's",
    "python recipes/ablate.py": "hours of trainings; tests/experiments/test_ablation.py runs a small one",
    "python -m qllava.models.convert": "needs pickled weights; tests/models/test_hub.py runs it",
    "python benchmarks/gpu.py": "needs a GPU; tests/test_benchmarks.py runs each step at a tiny size",
    "cp -r": "the shell's own",
    "cat 'part-": "joins what a cluster wrote",
    "QLLAVA_CACHE=cache qllava check 'part-": "looks at what a cluster wrote",
    "from llama_cpp": "another program's; tests/interop",
    "qllava synthesize contexts.jsonl train.json --teacher MODEL --import-batch": "reads what a server wrote; "
    "tests/llm/test_batch.py",
}
"""Starts of commands that are not run here, and the reasons."""


def commands(page: Path) -> list[str]:
    """Return the commands of a page in order: lines of shell (continued lines are joined) and blocks of Python."""
    typed: list[str] = []
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        if language == "python":
            typed.append(body)
        elif language == "bash":
            lines = (shlex.join(shlex.split(line, comments=True)) for line in body.replace("\\\n", " ").splitlines())
            typed += [line for line in lines if line]
    return typed


@dataclass
class Reader:
    """A reader who types commands."""

    folder: Path
    """Folder in which commands are typed."""
    names: dict[str, str]
    """Replacements of names on the page."""
    parts: Callable[[str], list[str]]
    """Function that returns, for a command, flags that replace the parts of a preset."""
    served: list[list[str]] = field(default_factory=list)
    """Arguments of the servers that were started."""

    def type(self, command: str) -> tuple[int, str]:
        """Run one command, and return its exit status and everything that it printed."""
        for name, stand_in in self.names.items():
            command = command.replace(name, stand_in)
        out, before = io.StringIO(), sys.stdin
        sys.stdin = io.StringIO("What colour is the circle?\n")  # a chat reads lines, and ends after the last
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                status = self._run(command)
            except SystemExit as error:
                status = int(error.code or 0) if isinstance(error.code, int | None) else 1
            finally:
                sys.stdin = before
        return status, out.getvalue()

    def _run(self, command: str) -> int:
        if "\n" in command:
            exec(compile(command, "page.py", "exec"), {})  # a block of Python on one of our pages
            return 0
        words = shlex.split(command)
        if words[:2] == ["accelerate", "launch"]:  # one process of what it would start
            assert (self.folder / words[3]).is_file(), words[3]
            words = ["python", *words[4:]]
        if words[:2] == ["make", "finetune"]:
            words = ["python", "recipes/finetune_lora.py"]
        if Path(words[0]).name == "qllava":
            from qllava.cli import main

            return main(words[1:])
        assert words[0] == "python", f"nobody here runs {command!r}; say in NOT_RUN why"
        if words[1] == "demo/app.py":
            from qllava.pages import server as app

            return app.main(words[2:])
        trains = Path(words[1]).name in ("finetune_lora.py", "pretrain_projector.py")
        few = [*FEW_STEPS, *self.parts(command)] if trains else []
        with _command_line([words[1], *words[2:], *few]):
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        return 0


@contextlib.contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def fresh_folder(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Prepare a folder to type in, with recipes, demo and the reader's files; nano is small, and plans try less."""
    for name in ("recipes", "demo", "docs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    for name, count in NANO_IS_SMALL.items():
        patch.setattr(nano, name, count)
    patch.setattr(importlib.import_module("qllava.training.memory.fit"), "PACK_SIZES", TRIED)
    patch.setenv("QLLAVA_CACHE", str(folder / "cache"))
    patch.chdir(folder)
    own_data(folder)
    shutil.copytree(ROOT / "qllava" / "synthesis" / "prompts", folder / "mine")
    return folder


def own_data(folder: Path) -> None:
    """Write the files that the pages mention, under the names that they have there."""
    photos = folder / "photos"
    photos.mkdir()
    examples = json.loads(make_tiny_records(photos).read_text(encoding="utf-8"))
    (photos / "rows.json").unlink()
    make_image("red", (96, 96)).save(folder / "photo.png")
    make_image("red", (96, 96)).save(folder / "photo.jpg")
    make_image("blue", (64, 48)).save(photos / "one.jpg")
    for context in read_lines(write_contexts(folder / "contexts.jsonl", 8)):
        make_image("green").save(photos / context["image"])
    for name in ("pretrain_images", "images", "pretrain/images", "coco/train2017", "digits"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(photos, folder / name)
    held_out, mine = examples[:2], examples[2:]
    captions = [
        {"id": f"c{i}", "image": example["image"], "conversations": [
            {"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"A {colour} wall and a {colour} door."}
        ]}
        for i, (example, colour) in enumerate(zip(examples, ("red", "green", "blue", "yellow") * 2, strict=False))
    ]  # fmt: skip
    written: dict[str, Any] = {
        **dict.fromkeys(("mine.json", "train.json", "llava_instruct_150k.json"), mine),
        **dict.fromkeys(("captions.json", LCS, f"pretrain/{LCS}"), captions),
        "held_out.json": held_out, "more.json": mine[:4],
        "questions.json": [{"question": "What colour?", "image": one["image"], "answer": "red"} for one in held_out],
        "mine.yaml": {"train_file": "mine.json", "image_folder": "photos", "output_dir": "runs/several"},
        "my_vicuna.yaml": {"train_file": "mine.json", "image_folder": "photos"},
        "recipe.yaml": {"train_file": "mine.json", "image_folder": "photos", "eval_file": "held_out.json"},
    }  # fmt: skip
    for name, content in {**written, **evaluation_data(folder)}.items():
        lines = name.endswith(".jsonl")
        text = "".join(json.dumps(line) + "\n" for line in content) if lines else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")


def evaluation_data(folder: Path) -> dict[str, Any]:
    """Return ScienceQA problems, two files of answers to them, LLaVA-Bench's three files, and a vote, by file name."""
    problem = {
        "question": "Which is the capital?", "choices": ["Trenton", "Dover"], "answer": 1, "hint": "", "image": None,
        "subject": "social science", "grade": "grade3", "split": "test",
    }  # fmt: skip
    kept = folder / "kept"
    kept.mkdir()
    (kept / "hash.png").write_bytes((folder / "photo.png").read_bytes())
    return {
        "problems.json": {str(i): {**problem, "split": split} for i, split in enumerate(("test", "test", "train"))},
        "llava.jsonl": [{"question_id": str(i), "text": "The answer is A."} for i in range(2)],
        "gpt.jsonl": [{"question_id": str(i), "text": "The answer is B."} for i in range(2)],
        "bench_questions.jsonl": [
            {"question_id": 1, "image": "p0000.png", "category": "conv", "text": "What is it?"},
        ],
        "reference.jsonl": [{"question_id": 1, "text": "It is a dog."}],
        "bench_answers.jsonl": [{"question_id": 1, "text": "It is a cat."}],
        "votes.jsonl": [
            {"id": "v1", "question": "What is it?", "pictures": ["hash"], "answers": {"left": "a", "right": "b"},
             "models": {"left": "mine", "right": "merged"}, "vote": "left", "rater": "anna", "seed": 1}
        ],
    }  # fmt: skip


def stand_in_server(request: Request) -> Said:
    """Answer as a judge or as a teacher, in the form that the request asks for."""
    asked = str(request.body["messages"])
    if "The answer is X." in asked:
        return Said("The answer is B.")
    if "[First answer]" not in asked:
        return Said(good(request))
    return Said(json.dumps({"verdict": "first"} if "verdict" in asked else {"first": 8, "second": 7, "reason": "so"}))
