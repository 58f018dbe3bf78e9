"""Code that runs in a process of `turns`: the training loop waits for its turn at the end of each optimizer step."""

from __future__ import annotations

import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from benchmarks.counting import counter
from benchmarks.step import Step
from benchmarks.systems import Job, System, build, mean_loss
from qllava.data.encode import IGNORE_INDEX
from qllava.data.packing import packs_of


def run(job: Job, pipe: Connection) -> None:
    """Build the system of a job, and train as a `turns.Worker` commands."""
    warnings.filterwarnings("ignore")
    if job.memory is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.memory / total))
    turns = Turns(job, pipe)
    system = build(job, [turns])
    turns.begin(system)
    system.trainer.train()


class Tally:
    """Counter of each batch's positions in the language model and of its learned tokens."""

    def __init__(self, trainer: Any) -> None:
        self.batches: list[tuple[int, Any]] = []
        self._plain = trainer.training_step
        trainer.training_step = self._step

    def _step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "packs" in inputs:
            positions = sum(row["input_ids"].numel() for row in inputs["packs"])
            learned: Any = sum(row["learned"].numel() for row in inputs["packs"])
        else:
            positions = inputs["input_ids"].numel()
            learned = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()  # read later: reading it now makes the GPU wait
        self.batches.append((positions, learned))
        return self._plain(model, inputs, *args, **kwargs)


class Turns(TrainerCallback):
    """Callback that waits for the next command, and reports how long each step took and what was in it."""

    def __init__(self, job: Job, pipe: Connection) -> None:
        self.job, self.pipe = job, pipe
        self.system: Any = None
        self.tally: Any = None
        self.step = 0
        self.watching: Any = None
        self.command: list[str] = []
        self.started = 0.0

    def begin(self, system: System) -> None:
        """Report that the system is built."""
        self.system = system
        self.tally = Tally(system.trainer)
        self.pipe.send(("built", system.digest))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Discard what a rehearsal on a GPU recorded, and wait for the first command."""
        self.tally.batches = []
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step, and wait for the next command."""
        self.pipe.send(("step", self._report()))
        self.step += 1
        self._wait()

    def _wait(self) -> None:
        if self.job.device == "cuda":
            torch.cuda.empty_cache()  # the other systems need the memory now
        while True:
            try:
                self.command = self.pipe.recv().split(" ", 1)
            except EOFError:  # the commanding process has ended
                self.command = ["stop"]
            if self.command[0] == "stop":
                raise SystemExit(0)
            if self.command[0] != "loss":
                break
            numbers = range(self.step * self.job.samples_per_step - int(self.command[1]), self._samples())
            self.pipe.send(("loss", mean_loss(self.system, numbers, self.job.device)))
        if self.command[0] == "count":
            self.watching = counter()
        elif self.command[0] == "profile":
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.job.device == "cuda" else [])]
            self.watching = profile(activities=kinds)
        if self.watching is not None:
            self.watching.__enter__()
        if self.job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self.started = time.perf_counter()

    def _samples(self) -> int:
        """Return the number of samples of all steps so far."""
        return self.step * self.job.samples_per_step

    def _report(self) -> Step:
        if self.job.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        flops = None
        if self.watching is not None:
            self.watching.__exit__(None, None, None)
            if self.command[0] == "count":
                flops = self.watching.get_total_flops()
            else:
                by = "self_cuda_time_total" if self.job.device == "cuda" else "self_cpu_time_total"
                table = self.watching.key_averages().table(sort_by=by, row_limit=30)
                Path(self.command[1]).write_text(table, encoding="utf-8")
            self.watching = None
        size, cuda = self.job.samples_per_step, self.job.device == "cuda"
        batches, self.tally.batches = self.tally.batches, []
        image_token = self.system.trainer.model.get_base_model().config.image_token_index
        samples = [self.system.rows.dataset[n] for n in range(self._samples(), self._samples() + size)]
        return Step(
            seconds=seconds,
            samples=size,
            positions=sum(positions for positions, _ in batches),
            learned=sum(int(learned) for _, learned in batches),
            needed=sum(len(row.input_ids) for row in packs_of(samples, image_token, tokens_per_pack=None)),
            flops=flops,
            peak_bytes=torch.cuda.max_memory_allocated() if cuda else 0,
            reserved_bytes=torch.cuda.max_memory_reserved() if cuda else 0,
        )
