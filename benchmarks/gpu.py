"""Everything that only a GPU can tell, by one command.

    python benchmarks/gpu.py --out benchmarks/results/gpu

LLaVA-1.5-7B and 13B with random NF4 weights (no download). Measured are: the machine's ceiling (a large product in
bf16); attention by rows, each kernel; the three systems of `throughput.py` in turn, with their share of the ceiling;
peak memory of qllava's step under caps of 8, 12, 16 and 24 GB; and a profile of a step. Written are OUT.json, OUT.md,
OUT.profile.txt.

`--device cpu --tiny` runs all of it but the caps at no size, to see that it runs.
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

from benchmarks.machine import provenance
from benchmarks.tables import format_table
from benchmarks.throughput import MIXTURES, Plan, compare, disagreement
from benchmarks.turns import Failed, Worker
from qllava.data.packing import Group
from qllava.surroundings import prepare_process
from qllava.training.attention import Sight, row_attention

CAPS_GB = (8, 12, 16, 24)
SHAPES = ("llava_7b", "llava_13b")


def seconds_of(call: Callable[[], Any], device: str, repetitions: int = 10) -> float:
    """Median time of a call, after two that are not timed."""
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
    """TFLOP per second of a square product, in bf16 on a GPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device) / 1e12


def kernels(device: str, heads: int, width: int, prefix: int, branch: int, samples: int) -> list[dict[str, Any]]:
    """Attention of one row forward and backward by each kernel: milliseconds, or why it does not run here."""
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
            answer, _ = row_attention(torch.nn.Identity(), query, key, value, None, sight=sight)
            answer.float().square().sum().backward()

        try:
            taken: float | None = 1000 * seconds_of(step, device)
            note = ""
        except (RuntimeError, NotImplementedError, ImportError, ValueError, TypeError) as error:
            taken, note = None, str(error).splitlines()[0][:80]
        out.append({"kernel": kernel, "tokens": length, "milliseconds": taken, "note": note})
    return out


def under_caps(plan: Plan, caps: Sequence[int]) -> list[dict[str, Any]]:
    """A step of qllava when it may take so many GB: does it run, and how much does it take at most."""
    out = []
    texts = plan.texts([1.95], 3)
    for cap in caps:
        line: dict[str, Any] = {"shape": plan.shape, "cap_gb": cap, "fits": False}
        # As a run would be set up on such a card: `fit_memory` chooses rows and recomputation.
        changes = {"fit_memory": f"{cap}GB"}
        job = replace(plan.job("qllava", texts, recompute=None, changes=changes), memory=cap * 2**30)
        try:
            worker = Worker(job)
            try:
                worker.step()
                step = worker.step()
            finally:
                worker.close()
            line |= {
                "fits": True,
                "peak_gb": step.peak_bytes / 2**30,
                "reserved_gb": step.reserved_bytes / 2**30,
                "samples_per_second": step.samples / step.seconds,
            }
        except Failed as error:
            if not error.out_of_memory:
                raise
        out.append(line)
    return out


def profiled(plan: Plan, path: Path) -> None:
    """Write where the time of a step of qllava goes."""
    worker = Worker(plan.job("qllava", plan.texts([1.95], 3)))
    try:
        worker.step()
        worker.profile(path)
    finally:
        worker.close()


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All of it."""
    cuda = given.device == "cuda"
    result: dict[str, Any] = {**provenance(given.device)}
    result["ceiling_tflops"] = ceiling(given.device, 8192 if cuda else 256)
    sizes = (32, 128, 576, 100, 8) if cuda else (4, 16, 16, 8, 4)
    result["kernels"] = kernels(given.device, *sizes)
    result["throughput"], result["memory"] = [], []
    for shape in given.shape:
        mixtures = tuple(given.samples_per_image)
        rank = 64 if cuda else 4
        plan = Plan(shape, given.device, mixtures, given.samples_per_step, given.repetitions, folder, lora_r=rank)
        for line in compare(plan):
            done = line["samples_per_second"] * line["tflop_per_sample"]
            result["throughput"].append({"shape": shape, **line, "of_ceiling": done / result["ceiling_tflops"]})
        if cuda:
            result["memory"] += under_caps(plan, CAPS_GB)
        profiled(plan, given.out.with_suffix(f".{shape}.profile.txt"))
    return result


def as_text(result: dict[str, Any]) -> str:
    """The result as a page of Markdown."""
    head = [f"{name}: {result[name]}" for name in ("date", "machine", "versions", "commit")]
    head.append(f"Ceiling: {result['ceiling_tflops']:.1f} TFLOP/s.")
    tables = [
        f"## {name}\n\n{format_table(result[name])}" for name in ("kernels", "throughput", "memory") if result[name]
    ]
    return "\n\n".join(["# What was measured on a GPU" if result["memory"] else "# A trial", *head, *tables]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 when the losses of the systems do not agree."""
    parser = argparse.ArgumentParser(description="All benchmarks that need a GPU.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", nargs="+", default=None, help="functions of shapes.py; both LLaVA-1.5 by default")
    parser.add_argument("--samples-per-image", type=float, nargs="+", default=MIXTURES)
    parser.add_argument("--samples-per-step", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    given = parser.parse_args(arguments)
    given.shape = given.shape or (["tiny"] if given.tiny else list(SHAPES))
    if given.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device is here; --device cpu --tiny shows that the command runs.", file=sys.stderr)
        return 1
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(given, Path(folder))
    text = as_text(result)
    print(text)
    given.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(text, encoding="utf-8")
    wrong = disagreement(result["throughput"])
    if wrong:
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
