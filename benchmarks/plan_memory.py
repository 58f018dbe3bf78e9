"""What `qllava plan` says of each phase, beside what a real process takes on the CPU.

    python benchmarks/plan_memory.py --out benchmarks/results/plan_memory.json

A whole `finetune` over random weights, with held-out questions, and a chat with its result run in a process of their
own, which samples its anonymous memory and keeps the peak of each phase. The same with a model of no size tells what
Python, its libraries and the data take: the difference of the two runs is what the plan has to say. Freed heap is
given back where a phase begins, so that no phase counts what another one has left behind.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM

import qllava
from benchmarks import shapes
from benchmarks.machine import provenance
from benchmarks.tables import format_table
from qllava.config import NANO_WEIGHTS
from qllava.models.adapter import save_projector
from qllava.models.lora import Lora
from qllava.models.shapes import shapes_of
from qllava.surroundings import prepare_process
from qllava.training import memory, run, scores
from qllava.training.memory.phases import PHASES
from qllava.training.settings import Settings, parse
from qllava.training.trainer import LlavaTrainer

IMAGES = 4
WORDS = "The small red circle is left of the large blue square. "
BOUND = 0.1
STATUS = Path("/proc/self/status")
NEW_TOKENS = 16
"""Of every answer, in place of the run's and the chat's own: random weights never end one."""


class Watch:
    """Samples the anonymous memory of this process, and keeps the peak of each phase."""

    def __init__(self) -> None:
        self.phase, self.peaks = "", dict.fromkeys(("", *PHASES), 0)
        self._ended = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def enter(self, phase: str) -> None:
        """Begin a phase with what lives, and nothing that was freed."""
        gc.collect()
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).malloc_trim(0)
        self.phase = phase

    def inside(self, phase: str, call: Callable[..., Any], *given: Any, after: str | None = None, **named: Any) -> Any:
        """Call as this phase, and go on with another, or with the one before; "" is none."""
        before = self.phase
        self.enter(phase)
        try:
            return call(*given, **named)
        finally:
            self.enter(before if after is None else after)

    def end(self) -> dict[str, int]:
        """Bytes by phase."""
        self._ended.set()
        return {name: self.peaks[name] for name in PHASES}

    def _sample(self) -> None:
        while not self._ended.is_set():
            lines = STATUS.read_text(encoding="ascii").splitlines()
            taken = next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
            self.peaks[self.phase] = max(self.peaks[self.phase], taken)
            time.sleep(0.002)


def make_parts(folder: Path, shape: str) -> None:
    """Write a language model in bf16, a tower, and rows about images."""
    config: Any = getattr(shapes, shape)()
    torch.manual_seed(0)
    LlamaForCausalLM(config.text_config).to(torch.bfloat16).save_pretrained(folder / "llama")  # type: ignore[arg-type]
    AutoTokenizer.from_pretrained(NANO_WEIGHTS / "llama").save_pretrained(folder / "llama")
    CLIPVisionModel(config.vision_config).save_pretrained(folder / "tower")
    side = config.vision_config.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder / "tower"
    )
    rng, rows = np.random.default_rng(0), []
    for number in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        question = {"from": "human", "value": f"<image>\n{WORDS * 4}"}
        rows.append(
            {
                "id": str(number),
                "image": f"{number}.png",
                "conversations": [question, {"from": "gpt", "value": WORDS * 12}],
            }
        )
    for name in ("train.json", "held_out.json"):
        (folder / name).write_text(json.dumps(rows), encoding="utf-8")


def settings_of(folder: Path, tokens: int) -> Settings:
    """One step over all images, and its evaluation."""
    fields = {
        "language_model": folder / "llama",
        "vision_tower": folder / "tower",
        "projector": folder / "aligned",
        "train_file": folder / "train.json",
        "eval_file": folder / "held_out.json",
        "template": "chatml",
        "lora_r": 8,
        "lora_alpha": 16,
        "per_device_train_batch_size": IMAGES,
        "per_device_eval_batch_size": 1,
        "tokens_per_row": tokens,
        "max_length": tokens,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "skip_check": True,
        "use_cpu": True,
    }
    line = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return parse(line, output_dir=str(folder / "run"), nano={})


def measure(folder: Path, shape: str, tokens: int, *, keep: bool = True) -> dict[str, int]:
    """Peak anonymous memory of each phase of a run and of a chat with it, in this process.

    Without `keep` the system's allocator is left as it is, and gives freed memory back earlier.
    """
    if not keep:
        run.keep_freed_memory = lambda: False
    scores.MAX_ANSWER_TOKENS = NEW_TOKENS
    make_parts(folder, shape)
    settings = settings_of(folder, tokens)
    settings.model.projector = None
    assembled = run._assemble(settings)
    save_projector(assembled.model, folder)
    del assembled
    (folder / "aligned").mkdir()
    (folder / "projector.safetensors").rename(folder / "aligned" / "projector.safetensors")
    settings = settings_of(folder, tokens)
    watch = Watch()
    train, evaluate = run.train_stage, LlavaTrainer.evaluate
    run.train_stage = partial(watch.inside, "step", train, after="")  # type: ignore[assignment]
    LlavaTrainer.evaluate = lambda own, *a, **k: watch.inside("evaluation", evaluate, own, *a, **k)  # type: ignore[method-assign]
    watch.inside("before", run.finetune, settings)
    watch.inside("chat", ask, folder)
    return watch.end()


def ask(folder: Path) -> None:
    """One question to the finished run."""
    qllava.load(str(folder / "run")).answer(folder / "0.png", WORDS * 4, max_new_tokens=NEW_TOKENS)


def planned(folder: Path, tokens: int) -> dict[str, int]:
    """What the plan says of the same run, all its questions answered at once."""
    settings = settings_of(folder, tokens)
    config, lora = shapes_of(settings.model).config, Lora.of_settings(settings.model)
    setup = memory.setup_of(settings.train, config, lora, load_in_4bit=settings.model.load_in_4bit)
    asking = scores.asking_of(settings.train, setup.lora, held_out=True)
    asking = replace(asking, before=IMAGES, during=IMAGES, new_tokens=NEW_TOKENS)
    found = memory.phases_of(setup, memory.estimate(setup), asking)
    found["chat"] = replace(found["chat"], new_tokens=NEW_TOKENS)
    return {name: phase.peak(setup, 64 << 30) for name, phase in found.items()}


def compared(shape: str, tokens: int, flags: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A line for each phase: planned, measured beyond a model of no size, and their ratio."""
    found: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    for name in ("tiny", shape):
        with tempfile.TemporaryDirectory() as text:
            line = [sys.executable, "-m", "benchmarks.plan_memory", "--measure", text, "--shape", name]
            done = subprocess.run([*line, "--tokens", str(tokens), *flags], capture_output=True, text=True, check=True)
            found[name] = (planned(Path(text), tokens), json.loads(done.stdout.splitlines()[-1]))
    (none, base), (said, taken) = found["tiny"], found[shape]
    return [
        {
            "phase": phase,
            "planned_mb": (said[phase] - none[phase]) / 2**20,
            "measured_mb": (taken[phase] - base[phase]) / 2**20,
            "ratio": (said[phase] - none[phase]) / (taken[phase] - base[phase]),
            "of_no_size_mb": base[phase] / 2**20,
        }
        for phase in PHASES
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 when a phase is further than a tenth from its plan."""
    parser = argparse.ArgumentParser(description="Planned memory of each phase beside what a process takes.")
    parser.add_argument("--shape", default="cpu_bench", help="a function of shapes.py")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_memory.json"))
    parser.add_argument("--give-back", action="store_true", help="do not keep freed memory, as a run does")
    parser.add_argument("--measure", type=Path, help="a folder: measure here, and print bytes by phase")
    given = parser.parse_args(arguments)
    if given.measure:
        print(json.dumps(measure(given.measure, given.shape, given.tokens, keep=not given.give_back)))
        return 0
    lines = compared(given.shape, given.tokens, ["--give-back"] if given.give_back else [])
    print(format_table(lines))
    result = {
        **provenance("cpu"),
        "shape": given.shape,
        "tokens": given.tokens,
        "kept": not given.give_back,
        "phases": lines,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if any(abs(line["ratio"] - 1) > BOUND for line in lines) else 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
