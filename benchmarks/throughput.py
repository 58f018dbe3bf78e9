"""Benchmark of samples per second of qllava and TRL, on the same samples, in turn.

    python benchmarks/throughput.py --device cpu --json benchmarks/results/throughput_cpu.json

Three systems (`systems.py`) train the same model on the same samples, each in its own process, and compute their
optimizer steps in turn (`turns.py`). The table has the median of the ratios within repetitions and its interval, the
loss over learned tokens after the same samples, which must agree within 1 %, the share of positions that are neither
padding nor a prefix computed twice, and FLOPs. On a CPU the model has the fixed shape `shapes.cpu_bench`.

`--ablate` compares qllava with itself instead, with each single shortcut switched off.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import shapes
from benchmarks.machine import provenance
from benchmarks.pairing import largest_difference, paired_ratio
from benchmarks.samples import make_texts, write_texts
from benchmarks.step import Step
from benchmarks.systems import SYSTEMS, Job
from benchmarks.tables import format_table
from benchmarks.turns import Failed, Worker, interleave
from qllava.surroundings import prepare_process

MIXTURES = (1.0, 1.95, 3.0)
AGREEMENT = 0.01

ABLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Changes of a Job with the shortcut, and without it. `lora_first` has an effect only with recomputation.
    "share_image_prefix": ({}, {"changes": {"share_image_prefix": False}}),
    "stop_tower": ({}, {"changes": {"stop_tower": False}}),
    "prune_last_layer": ({}, {"changes": {"prune_last_layer": False}}),
    "lora_first": ({"recompute": True}, {"recompute": True, "changes": {"lora_first": False}}),
    "compile_layers": ({"changes": {"compile_layers": True}}, {"changes": {"compile_layers": False}}),
    "head_on_learned": ({}, {"whole_head": True}),
    "no_recomputation": ({"recompute": False}, {"recompute": True}),
}


@dataclass(frozen=True)
class Plan:
    """Settings of a measurement; see also `systems.Job`."""

    shape: str
    """Name of a function of `shapes`."""
    device: str
    """cpu or cuda."""
    mixtures: tuple[float, ...]
    """Mean numbers of samples per image that are measured; see `samples`."""
    samples_per_step: int
    """Samples of an optimizer step."""
    repetitions: int
    """Timed steps of each mixture; one more before them counts FLOPs and is not timed."""
    folder: Path
    """Folder for images, examples and the trainers' files."""
    lora_r: int = 16
    """Rank of LoRA."""
    memory: int | None = None
    """Bytes of GPU memory that each process may take; None: all."""

    def texts(self, mixtures: Sequence[float], steps: int) -> str:
        """Write the samples of `steps` steps of each mixture in turn, and of one step more; return the file's path."""
        side = getattr(shapes, self.shape)().vision_config.image_size
        # The additional step is never computed: the loader reads one step ahead, and every timed step includes reading.
        texts = [
            text
            for mixture in [*mixtures, mixtures[-1]]
            for text in make_texts(
                self.folder / "images",
                side=side,
                samples_per_image=mixture,
                samples_per_step=self.samples_per_step,
                steps=steps,
                seed=0,
            )
        ][: (len(mixtures) * steps + 1) * self.samples_per_step]
        path = self.folder / f"texts-{'-'.join(map(str, mixtures))}-{steps}.json"
        write_texts(path, texts)
        return str(path)

    def job(self, system: Any, texts: str, **changes: Any) -> Job:
        """Return the job of a system with its defaults.

        qllava recomputes no layers on a CPU; on a GPU it decides by the memory.
        """
        whole = next(size for size in range(min(8, self.samples_per_step), 0, -1) if self.samples_per_step % size == 0)
        recompute = system == "trl" or (None if system == "qllava" and self.device == "cuda" else False)
        values = {"batch": whole, "recompute": recompute, **changes}
        return Job(
            system,
            self.shape,
            self.device,
            tempfile.mkdtemp(dir=self.folder, prefix=f"{system}-"),
            texts,
            self.samples_per_step,
            lora_r=self.lora_r,
            memory=self.memory,
            **values,
        )


def tuned(plan: Plan) -> Job:
    """Return TRL's fastest job: the best batch size, without recomputation if the memory suffices for it.

    Raises:
        SystemExit: If no batch size fits into the memory.
    """
    texts = plan.texts(plan.mixtures[:1], 2)
    sizes = [size for size in range(1, plan.samples_per_step + 1) if plan.samples_per_step % size == 0]
    best: tuple[float, Job] | None = None
    for recompute in (False, True):
        for batch in sizes:
            try:
                (steps,) = measure([plan.job("trl_tuned", texts, batch=batch, recompute=recompute)], 1)
            except Failed as error:
                if not error.out_of_memory:
                    raise
                break  # a larger batch does not fit either
            seconds = steps[-1].seconds
            print(f"TRL, batch {batch}, recomputation {recompute}: {seconds:.2f} s per step", flush=True)
            if best is not None and seconds > best[0]:
                break  # larger batches have even more padding
            best = seconds, plan.job("trl_tuned", texts, batch=batch, recompute=recompute)
        if best is not None:
            break  # recomputation that is not needed is slower
    if best is None:
        raise SystemExit("TRL does not fit into the memory with any batch size.")
    return best[1]


def measure(jobs: Sequence[Job], repetitions: int) -> list[list[Step]]:
    """Return the steps of jobs that run in turn; the first of each counts FLOPs and is not timed."""
    workers: list[Worker] = []
    try:
        for job in jobs:
            workers.append(Worker(job))
        counted = [[worker.step(count=True)] for worker in workers]
        return [first + rest for first, rest in zip(counted, interleave(workers, repetitions), strict=True)]
    finally:
        for worker in workers:
            worker.close()


def compare(plan: Plan, heard: Callable[[list[dict[str, Any]]], None] = lambda lines: None) -> list[dict[str, Any]]:
    """Compare the three systems over all mixtures, and return a line for each system and mixture.

    Args:
        plan: Settings of the measurement.
        heard: Function that is called with the lines of each mixture as soon as they are measured.

    Raises:
        SystemExit: If the systems start from different weights, or do not learn the same tokens.
    """
    best = tuned(plan)
    texts = plan.texts(plan.mixtures, 1 + plan.repetitions)
    jobs = [
        plan.job("trl", texts),
        replace(best, texts=texts),
        plan.job("qllava", texts),
    ]
    workers: list[Worker] = []
    found: list[dict[str, Any]] = []
    try:
        for job in jobs:
            workers.append(Worker(job))
        if len({worker.digest for worker in workers}) != 1:
            raise SystemExit("The systems do not start from the same LoRA and projector.")
        for mixture in plan.mixtures:
            counted = [worker.step(count=True) for worker in workers]
            steps = interleave(workers, plan.repetitions)
            check_same(counted, steps)
            losses = [worker.loss(plan.samples_per_step) for worker in workers]
            found += summarize(mixture, counted, steps, losses)
            print(format_table(found[-len(SYSTEMS) :]), flush=True)
            heard(found[-len(SYSTEMS) :])
    finally:
        for worker in workers:
            worker.close()
    return found


def check_same(counted: Sequence[Step], steps: Sequence[Sequence[Step]]) -> None:
    """Check that all systems learned the same number of tokens in each step, so that they can be compared.

    Raises:
        SystemExit: If they did not.
    """
    learned = [[step.learned for step in (first, *rest)] for first, rest in zip(counted, steps, strict=True)]
    if any(other != learned[0] for other in learned):
        raise SystemExit(f"The systems did not learn the same tokens; learned tokens of each step: {learned}.")


def summarize(
    mixture: float, counted: Sequence[Step], steps: Sequence[Sequence[Step]], losses: Sequence[float]
) -> list[dict[str, Any]]:
    """Return a line for each system; the others are compared with the first."""
    out = []
    baseline = [step.seconds for step in steps[0]]
    for system, first, taken, loss in zip(SYSTEMS, counted, steps, losses, strict=True):
        ratio, interval = paired_ratio([step.seconds for step in taken], baseline)
        seconds = sorted(step.seconds for step in taken)[len(taken) // 2]
        out.append(
            {
                "samples_per_image": mixture,
                "system": system,
                "samples_per_second": round(first.samples / seconds, 3),
                "ratio": round(ratio, 3),
                "ratio_ci95": [round(edge, 3) for edge in interval],
                "loss": loss,
                "useful_tokens": round(sum(step.needed for step in taken) / sum(step.positions for step in taken), 4),
                "tflop_per_sample": round((first.flops or 0) / first.samples / 1e12, 4),
                "repetitions": len(taken),
            }
        )
    return out


def ablate(plan: Plan, mixture: float) -> list[dict[str, Any]]:
    """Measure how much faster a step of qllava is with each single shortcut than without it."""
    texts = plan.texts([mixture], 1 + plan.repetitions)
    out = []
    for name, (on, off) in ABLATIONS.items():
        steps = measure([plan.job("qllava", texts, **changes) for changes in (on, off)], plan.repetitions)
        ratio, interval = paired_ratio(*([step.seconds for step in taken[1:]] for taken in steps))
        flops = [(taken[0].flops or 0) / taken[0].samples / 1e12 for taken in steps]
        out.append(
            {
                "samples_per_image": mixture,
                "shortcut": name,
                "ratio": round(ratio, 3),
                "ratio_ci95": [round(edge, 3) for edge in interval],
                "tflop_per_sample": [round(value, 4) for value in flops],
                "repetitions": plan.repetitions,
            }
        )
        print(format_table(out[-1:]), flush=True)
    return out


def disagreement(found: Sequence[dict[str, Any]]) -> str | None:
    """Return a sentence if the losses differ by more than 1 %, or None if they agree."""
    for mixture in dict.fromkeys(line["samples_per_image"] for line in found):
        losses = [line["loss"] for line in found if line["samples_per_image"] == mixture]
        if not largest_difference(losses) <= AGREEMENT:
            return f"With {mixture} samples per image the losses differ by more than 1 %: {losses}."
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print and write the figures; return 1 if the losses do not agree."""
    parser = argparse.ArgumentParser(description="Compare the samples per second of qllava and TRL.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", default=None, help="name of a function of benchmarks/shapes.py")
    parser.add_argument("--samples-per-image", type=float, nargs="+", default=MIXTURES)
    parser.add_argument("--samples-per-step", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--ablate", action="store_true", help="measure qllava with each single shortcut switched off")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to check that the command runs")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args(arguments)
    shape = given.shape or ("tiny" if given.tiny else "cpu_bench" if given.device == "cpu" else "llava_7b")
    with tempfile.TemporaryDirectory() as folder:
        mixtures = tuple(given.samples_per_image)
        plan = Plan(shape, given.device, mixtures, given.samples_per_step, given.repetitions, Path(folder))
        found = [line for m in mixtures for line in ablate(plan, m)] if given.ablate else compare(plan)
    print(format_table(found))
    if given.json:
        about = provenance(given.device)
        given.json.write_text(json.dumps([{**line, **about} for line in found], indent=2) + "\n", encoding="utf-8")
    wrong = None if given.ablate else disagreement(found)
    if wrong:
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
