"""All benchmarks that need a GPU, in steps of a few minutes that write their figures as they measure.

    python benchmarks/gpu.py --quick         # matrix product, attention kernels, one step of each system
    python benchmarks/gpu.py --memory        # measured and planned peaks of every preset under caps of 8 to 24 GB
    python benchmarks/gpu.py --throughput    # qllava and TRL by samples per image, and a profile of a step
    python benchmarks/gpu.py --fp16          # a step in fp16 with loss scaling, as on a T4, and one in bf16

Without a flag, all steps run. Models have random NF4 weights (no download). Every measurement is written to OUT.json
and OUT.md at once, and each step keeps the figures of the others. `--memory` starts no new case after `--minutes`; run
the same command again to measure the missing ones.

`--device cpu --tiny` runs any step with a tiny model, to check that it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import phases
from benchmarks.machine import provenance
from benchmarks.systems import SYSTEMS, Job
from benchmarks.tables import format_table
from benchmarks.throughput import MIXTURES, Plan, compare, disagreement
from benchmarks.turns import Worker
from qllava.data.packing import Group
from qllava.files import write_whole
from qllava.surroundings import prepare_process
from qllava.training.step.attention import Sight, pack_attention

CAPS_GB = (8, 12, 16, 24)
PRESETS = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*gb*.yaml"))


def seconds_of(call: Callable[[], Any], device: str, repetitions: int = 10) -> float:
    """Return the median seconds of a call, after two calls that are not timed."""
    found = []
    for _ in range(repetitions + 2):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        found.append(time.perf_counter() - started)
    return median(found[2:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ceiling(device: str, size: int) -> float:
    """Return the TFLOP per second of a square matrix product, in bf16 on a GPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device) / 1e12


def kernels(device: str, heads: int, width: int, prefix: int, branch: int, samples: int) -> list[dict[str, Any]]:
    """Measure attention of one pack, forward and backward, with each kernel.

    Args:
        device: cuda or cpu.
        heads: Number of attention heads.
        width: Width of a head.
        prefix: Tokens of the prefix that the samples of a group share.
        branch: Tokens of a sample after the prefix.
        samples: Number of samples; two share a prefix.

    Returns:
        A line per kernel: its milliseconds, or None with a note why it does not run on this machine.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    groups = tuple(
        Group(start, prefix, (branch,) * 2)
        for start in range(0, samples // 2 * (prefix + 2 * branch), prefix + 2 * branch)
    )
    length = groups[-1].end
    learned = torch.arange(0, length, 2, device=device)
    query, key, value = (
        torch.randn(1, heads, length, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    out: list[dict[str, Any]] = []
    for kernel in ("groups", "varlen", "flex"):
        sight = Sight(groups, learned, (), kernel)

        def step(sight: Sight = sight) -> None:
            answer, _ = pack_attention(torch.nn.Identity(), query, key, value, None, sight=sight)
            answer.float().square().sum().backward()

        try:
            taken: float | None = 1000 * seconds_of(step, device)
            note = ""
        except (RuntimeError, NotImplementedError, ImportError, ValueError, TypeError) as error:
            taken, note = None, str(error).splitlines()[0][:80]
        out.append({"kernel": kernel, "tokens": length, "milliseconds": taken, "note": note})
    return out


def profiled(plan: Plan, path: Path) -> None:
    """Write a profile of one step of qllava."""
    worker = Worker(plan.job("qllava", plan.texts([1.95], 3)))
    try:
        worker.step()
        worker.profile(path)
    finally:
        worker.close()


class Record:
    """The figures of all steps, in one file that is rewritten after each measurement."""

    def __init__(self, out: Path, device: str) -> None:
        self.out = out.with_suffix(".json")
        found = json.loads(self.out.read_text(encoding="utf-8")) if self.out.is_file() else {}
        about = provenance(device)
        # Figures of another commit or machine are not mixed with new ones.
        same = all(found.get(name) == about[name] for name in ("machine", "versions", "commit"))
        self.result: dict[str, Any] = {**(found if same else {}), **about}
        self.out.parent.mkdir(parents=True, exist_ok=True)

    def begin(self, *names: str) -> None:
        """Remove the figures that an earlier run of the same step has written."""
        for name in names:
            self.result[name] = []

    def add(self, name: str, lines: list[dict[str, Any]]) -> None:
        """Add lines to a table, and write all tables."""
        self.result.setdefault(name, []).extend(lines)
        for path, text in (
            (self.out, json.dumps(self.result, indent=2) + "\n"),
            (self.out.with_suffix(".md"), as_text(self.result)),
        ):
            write_whole(path, text)

    def has(self, name: str, **values: Any) -> bool:
        """Return whether a table has a line with these values."""
        return any(all(line[key] == value for key, value in values.items()) for line in self.result.get(name, ()))


def quick(given: argparse.Namespace, record: Record, folder: Path) -> None:
    """Measure a matrix product, each attention kernel, and a step of each system with the loss after it."""
    cuda = given.device == "cuda"
    record.begin("ceiling", "kernels", "step")
    record.add("ceiling", [{"tflops": ceiling(given.device, 8192 if cuda else 256)}])
    record.add("kernels", kernels(given.device, *((32, 128, 576, 100, 8) if cuda else (4, 16, 16, 8, 4))))
    plan = _plan(given, folder, given.shape[0])
    texts = plan.texts([1.95], 2)
    for system in SYSTEMS:
        record.add("step", [{"shape": plan.shape, **one_step(plan.job(system, texts))}])


def one_step(job: Job) -> dict[str, Any]:
    """Return the figures of a system's second step, which is typical of later ones, and the loss after it."""
    worker = Worker(job)
    try:
        worker.step()
        step = worker.step()
        loss = worker.loss(job.samples_per_step)
    finally:
        worker.close()
    return {
        "system": job.system,
        "dtype": str(job.dtype).removeprefix("torch."),
        "samples_per_second": step.samples / step.seconds,
        "tokens_per_second": step.positions / step.seconds,
        "peak_gb": step.peak_bytes / 2**30,
        "reserved_gb": step.reserved_bytes / 2**30,
        "loss": loss,
    }


def memory(given: argparse.Namespace, record: Record, folder: Path) -> None:
    """Measure and plan the memory peak of each phase, for presets under caps."""
    until = time.monotonic() + 60 * given.minutes
    cases = [(preset, cap) for preset in given.preset for cap in given.cap]
    left = [(preset, cap) for preset, cap in cases if not record.has("memory", preset=preset.stem, cap_gb=cap)]
    for number, (preset, cap) in enumerate(left):
        if time.monotonic() > until:
            print(f"Cases not measured yet: {len(left) - number}. Run the command again.", file=sys.stderr)
            return
        place = tempfile.mkdtemp(dir=folder)
        record.add("memory", phases.lines_of(phases.Case(str(preset), cap, given.device, place)))
        print(format_table(record.result["memory"]), flush=True)


def throughput(given: argparse.Namespace, record: Record, folder: Path) -> None:
    """Compare the three systems in turn, by samples per image, and write a profile of a step."""
    record.begin("throughput")
    for shape in given.shape:
        plan = _plan(given, folder, shape)
        compare(plan, lambda lines, shape=shape: record.add("throughput", [{"shape": shape, **line} for line in lines]))
        profiled(plan, record.out.with_suffix(f".{shape}.profile.txt"))


def fp16(given: argparse.Namespace, record: Record, folder: Path) -> None:
    """Measure a step of qllava in fp16 and one in bf16; on a CPU both are in fp32."""
    record.begin("fp16")
    plan = _plan(given, folder, given.shape[0])
    texts = plan.texts([1.95], 2)
    for half in (False, True):
        job = replace(plan.job("qllava", texts), half=half)
        record.add("fp16", [{"shape": plan.shape, **one_step(job)}])


def _plan(given: argparse.Namespace, folder: Path, shape: str) -> Plan:
    rank = 64 if given.device == "cuda" else 4
    mixtures = tuple(given.samples_per_image)
    return Plan(shape, given.device, mixtures, given.samples_per_step, given.repetitions, folder, lora_r=rank)


STEPS = {"quick": quick, "memory": memory, "throughput": throughput, "fp16": fp16}
TABLES = ("ceiling", "kernels", "step", "memory", "throughput", "fp16")


def as_text(result: dict[str, Any]) -> str:
    """Return the result as a page of Markdown."""
    head = [f"{name}: {result[name]}" for name in ("date", "machine", "versions", "commit")]
    tables = [f"## {name}\n\n{format_table(result[name])}" for name in TABLES if result.get(name)]
    return "\n\n".join(["# Results of gpu.py", *head, *tables]) + "\n"


def wrong_losses(result: dict[str, Any]) -> str | None:
    """Return a sentence if systems that computed the same steps have different losses, so that speeds do not count."""
    for name in ("step", "throughput", "fp16"):
        lines = [{"samples_per_image": 1.95, **line} for line in result.get(name, ())]
        for shape in dict.fromkeys(line["shape"] for line in lines):
            if wrong := disagreement([line for line in lines if line["shape"] == shape]):
                return f"{name}, {shape}: {wrong}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print and write the figures; return 1 if the losses of the systems do not agree."""
    parser = argparse.ArgumentParser(description="Run all benchmarks that need a GPU.")
    for name, step in STEPS.items():
        parser.add_argument(f"--{name}", action="store_true", help=str(step.__doc__).splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", nargs="+", default=None, help="names of functions of shapes.py (default: llava_7b)")
    parser.add_argument("--preset", type=Path, nargs="+", default=PRESETS, help="presets of --memory (default: all)")
    parser.add_argument("--cap", type=int, nargs="+", default=CAPS_GB, help="GB of --memory (default: 8 12 16 24)")
    parser.add_argument("--minutes", type=float, default=8, help="--memory starts no case after this (default: 8)")
    parser.add_argument("--samples-per-image", type=float, nargs="+", default=MIXTURES)
    parser.add_argument("--samples-per-step", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to check that the command runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    given = parser.parse_args(arguments)
    given.shape = given.shape or ["tiny" if given.tiny else "llava_7b"]
    if given.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device was found. Use --device cpu --tiny to check that the command runs.", file=sys.stderr)
        return 1
    record = Record(given.out, given.device)
    asked = [name for name in STEPS if getattr(given, name)] or list(STEPS)
    for name in asked:
        with tempfile.TemporaryDirectory() as folder:
            STEPS[name](given, record, Path(folder))
    print(as_text(record.result))
    wrong = wrong_losses(record.result)
    if wrong:
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
