"""Comparison of the memory that `qllava plan` computes for each phase with that of a real process on the CPU.

    python benchmarks/plan_memory.py --out benchmarks/results/plan_memory.json

A whole `finetune` with random weights and held-out questions, and a chat with its result, run in a process each. Two
figures are sampled in them, and the peak of each phase is kept:

- in use: memory that the C library has allocated (`mallinfo2`), for torch's tensors and for other libraries.
- taken: anonymous memory as the system counts it, which includes freed blocks that the C library keeps.

The same with a tiny model shows what Python, its libraries and the data take; the plan must match the difference of the
two runs. Freed memory is returned to the system where a phase starts, so that no phase counts what an earlier one has
left; within a phase it is kept, as in a run.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
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
from qllava.image_layout import ImageLayout
from qllava.models.adapter import save_projector
from qllava.models.lora import Lora
from qllava.models.shapes import shapes_of
from qllava.runs import PROJECTOR_FILE
from qllava.surroundings import prepare_process
from qllava.training import base, memory, run, scores
from qllava.training.memory.phases import PHASES
from qllava.training.settings import Settings, parse
from qllava.training.trainer import LlavaTrainer

IMAGES = 4
ROWS = 2
"""Samples of a step, each in its own pack."""
FRAME = 40
"""Upper limit of the tokens that the template adds to a question and its answer."""
WORDS = "The small red circle is left of the large blue square. "
BOUND = 0.1
RETURNED = 1 << 16
"""With `--give-back`: size in bytes from which a block returns to the system as soon as it is freed."""
STATUS = Path("/proc/self/status")
QUESTION = 4
"""Number of sentences in a question."""
NEW_TOKENS = 16
"""Tokens of every answer, instead of the run's and the chat's own limits, as random weights never end an answer."""


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`, in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")
        + ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def _in_use() -> int:
    """Return the bytes that the C library has allocated, in its heaps and as separate mappings."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Heap
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


def _taken() -> int:
    """Return the bytes of this process's anonymous memory that are in RAM."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


FIGURES = {"in_use": _in_use, "taken": _taken}
Peaks = dict[str, dict[str, int]]
"""Peak bytes, by figure and phase."""


class Watch:
    """Sampler of this process's memory, which keeps the peak of each phase."""

    def __init__(self) -> None:
        self.phase, self.peaks = "", {figure: dict.fromkeys(("", *PHASES), 0) for figure in FIGURES}
        self._ended = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def enter(self, phase: str) -> None:
        """Start a phase, after freed memory was returned to the system."""
        gc.collect()
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).malloc_trim(0)
        self.phase = phase

    def inside(self, phase: str, call: Callable[..., Any], *given: Any, after: str | None = None, **named: Any) -> Any:
        """Make a call in a phase, then enter the phase `after` (default: the one before); "" means no phase."""
        before = self.phase
        self.enter(phase)
        try:
            return call(*given, **named)
        finally:
            self.enter(before if after is None else after)

    def end(self) -> Peaks:
        """Stop, and return the peaks."""
        self._ended.set()
        return self.peaks

    def _sample(self) -> None:
        while not self._ended.is_set():
            for figure, count in FIGURES.items():
                # Read once: a phase that starts here would otherwise get the peak of the one before.
                phase = self.phase
                self.peaks[figure][phase] = max(self.peaks[figure][phase], count())
            time.sleep(0.002)


def shape_of(name: str) -> Any:
    """Return a config of `shapes`, with a vocabulary that is large enough for nano's tokenizer."""
    config: Any = getattr(shapes, name)()
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(_tokenizer()) + 1)
    return config


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(NANO_WEIGHTS / "llama")


def answer_that_fills(config: Any, tokens: int) -> str:
    """Return an answer that fills a pack of `tokens` tokens together with image and question, except for a sentence."""
    text = tokens - ImageLayout.of_config(config).tokens - FRAME
    one, two = (len(_tokenizer()(WORDS * times)["input_ids"]) for times in (1, 2))
    each = two - one  # a space joins the next word, and is a token at the end alone
    return WORDS * ((text - (one - each)) // each - QUESTION)


def make_parts(folder: Path, shape: str, tokens: int) -> None:
    """Write a language model in bf16, a tower, and examples of which each fills a pack of `tokens` tokens."""
    config = shape_of(shape)
    torch.manual_seed(0)
    LlamaForCausalLM(config.text_config).to(torch.bfloat16).save_pretrained(folder / "llama")  # type: ignore[arg-type]
    _tokenizer().save_pretrained(folder / "llama")
    CLIPVisionModel(config.vision_config).save_pretrained(folder / "tower")
    side = config.vision_config.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder / "tower"
    )
    rng, rows = np.random.default_rng(0), []
    answer = answer_that_fills(config, tokens)
    for number in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        question = {"from": "human", "value": f"<image>\n{WORDS * QUESTION}"}
        rows.append(
            {
                "id": str(number),
                "image": f"{number}.png",
                "conversations": [question, {"from": "gpt", "value": answer}],
            }
        )
    for name in ("train.json", "held_out.json"):
        (folder / name).write_text(json.dumps(rows), encoding="utf-8")


def settings_of(folder: Path, tokens: int) -> Settings:
    """Return the settings of two steps and an evaluation."""
    fields = {
        "language_model": folder / "llama",
        "vision_tower": folder / "tower",
        "projector": folder / "aligned",
        "train_file": folder / "train.json",
        "eval_file": folder / "held_out.json",
        "template": "chatml",
        "lora_r": 8,
        "lora_alpha": 16,
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": 1,
        "tokens_per_pack": tokens,
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


def measure(folder: Path, shape: str, tokens: int, *, keep: bool = True) -> Peaks:
    """Train in this process, and return its peaks.

    Args:
        folder: Where parts and run are written.
        shape: A function of `shapes`.
        tokens: Tokens of a pack.
        keep: Whether freed memory is kept, as a run does on a CPU.
    """
    if not keep:
        base.keep_freed_memory = lambda: False
    scores.MAX_ANSWER_TOKENS = NEW_TOKENS
    make_parts(folder, shape, tokens)
    settings = settings_of(folder, tokens)
    settings.model.projector = None
    assembled = base.assembled(settings)
    save_projector(assembled.model, folder)
    del assembled
    (folder / "aligned").mkdir()
    (folder / PROJECTOR_FILE).rename(folder / "aligned" / PROJECTOR_FILE)
    settings = settings_of(folder, tokens)
    watch = Watch()
    train, evaluate = run.train_stage, LlavaTrainer.evaluate
    run.train_stage = partial(watch.inside, "step", train, after="")  # type: ignore[assignment]
    LlavaTrainer.evaluate = lambda own, *a, **k: watch.inside("evaluation", evaluate, own, *a, **k)  # type: ignore[method-assign]
    watch.inside("before", run.finetune, settings)
    return watch.end()


def measure_chat(folder: Path) -> Peaks:
    """Load a finished run in this process, ask it one question, and return the peaks."""
    watch = Watch()
    watch.enter("chat")
    qllava.load(str(folder / "run")).answer(folder / "0.png", WORDS * QUESTION, max_new_tokens=NEW_TOKENS)
    return watch.end()


def planned(folder: Path, tokens: int) -> dict[str, int]:
    """Return the planned bytes of each phase of the same run.

    All its questions are answered in one batch, and every sample has its own image.
    """
    settings = settings_of(folder, tokens)
    config, lora = shapes_of(settings.model).config, Lora.of_settings(settings.model)
    setup = memory.setup_of(settings.train, config, lora, load_in_4bit=settings.model.load_in_4bit)
    setup = replace(setup, samples_per_image=1)
    asking = scores.asking_of(settings.train, setup.lora, held_out=True)
    asking = replace(asking, before=IMAGES, during=IMAGES, new_tokens=NEW_TOKENS)
    found = memory.phases_of(setup, memory.estimate(setup), asking)
    found["chat"] = replace(found["chat"], new_tokens=NEW_TOKENS)
    return {name: phase.peak(setup, 64 << 30) for name, phase in found.items()}


def compared(shape: str, tokens: int, *, give_back: bool = False) -> list[dict[str, Any]]:
    """Return a line for each phase: planned, in use and taken, less the tiny model's, and the plan relative to both."""
    found: dict[str, tuple[dict[str, int], Peaks]] = {}
    for name in ("tiny", shape):
        with tempfile.TemporaryDirectory() as text:
            line = [sys.executable, "-m", "benchmarks.plan_memory", "--shape", name, "--tokens", str(tokens)]
            peaks = _measured([*line, "--measure", text], give_back)
            chat = _measured([*line, "--measure-chat", text], give_back)
            found[name] = (planned(Path(text), tokens), {f: {**peaks[f], "chat": chat[f]["chat"]} for f in FIGURES})
    (none, base), (said, peaks) = found["tiny"], found[shape]
    lines = []
    for phase in PHASES:
        beyond = {figure: peaks[figure][phase] - base[figure][phase] for figure in FIGURES}
        plan = said[phase] - none[phase]
        lines.append(
            {
                "phase": phase,
                "planned_mb": plan / 2**20,
                **{f"{figure}_mb": size / 2**20 for figure, size in beyond.items()},
                **{f"ratio_{figure}": plan / size for figure, size in beyond.items()},
                **{f"of_no_size_{figure}_mb": base[figure][phase] / 2**20 for figure in FIGURES},
            }
        )
    return lines


def _measured(line: Sequence[str], give_back: bool) -> Peaks:
    """Run a measuring process and return its peaks; with `give_back` it returns every larger block when it is freed."""
    given = {"MALLOC_MMAP_THRESHOLD_": str(RETURNED)} if give_back else {}
    more = ["--give-back"] if give_back else []
    done = subprocess.run([*line, *more], stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **given})
    found: Peaks = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print and write the figures; return 1 if a phase differs by more than a tenth from its plan."""
    parser = argparse.ArgumentParser(description="Compare the planned memory of each phase with a real process.")
    parser.add_argument("--shape", default="cpu_bench", help="name of a function of shapes.py (default: cpu_bench)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a pack (default: 1024)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_memory.json"))
    parser.add_argument("--give-back", action="store_true", help="return freed memory to the system at once (slower)")
    parser.add_argument("--measure", type=Path, help="folder to train in, in this process; prints bytes by phase")
    parser.add_argument("--measure-chat", type=Path, help="folder of an earlier --measure, to chat with its run")
    given = parser.parse_args(arguments)
    if given.measure:
        print(json.dumps(measure(given.measure, given.shape, given.tokens, keep=not given.give_back)))
        return 0
    if given.measure_chat:
        print(json.dumps(measure_chat(given.measure_chat)))
        return 0
    lines = compared(given.shape, given.tokens, give_back=given.give_back)
    print(format_table(lines))
    result = {
        **provenance("cpu"),
        "shape": given.shape,
        "tokens": given.tokens,
        "given_back": given.give_back,
        "phases": lines,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    ratios = [line[f"ratio_{figure}"] for line in lines for figure in FIGURES]
    return 1 if any(abs(ratio - 1) > BOUND for ratio in ratios) else 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
