"""Benchmark of `qllava filter` on a million synthetic captions with a known power law: time, memory, correctness.

    python benchmarks/filter_million.py --folder DIR --out benchmarks/results/filter_million.json

A caption names one to five concepts, drawn by Zipf's law. The generator records which ones. From this record, not from
the filter's parsing of the text, `plainly` follows the definition of the filter step by step; the command must keep the
same captions. It runs in its own process; the bounds are 300 seconds and 1.5 GB.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import measured
from benchmarks.machine import provenance
from qllava.surroundings import prepare_process

SECONDS, BYTES = 300, 1.5e9

# Syllables of invented words; none of the words is a function word or a verb, or ends in -ing, -ed or -ly.
STARTS = ("b", "br", "d", "dr", "f", "g", "gl", "k", "kr", "m", "n", "p", "pl", "r", "v", "z")
ENDS = ("ako", "elu", "imo", "ora", "uska", "eno", "atu", "ibo")
BETWEEN = (" next to the ", " is riding a ", " with two ", ", and an ", " of the ", " quickly walked toward 3 ")


def concept(number: int) -> str:
    """Return the name of a concept, one or two words; different numbers have different names."""
    syllables = [start + end for start in STARTS for end in ENDS]
    word = ""
    rest = number
    while not word or rest:
        rest, digit = divmod(rest, len(syllables))
        word = syllables[digit] + word
    return f"old {word}" if number % 3 == 0 else word


def make(captions: int, concepts: int, exponent: float, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Return captions, and the concepts that each of them names.

    The r-th concept is drawn with a probability proportional to r to the power of -`exponent`.
    """
    rng = np.random.default_rng(seed)
    share = np.arange(1, concepts + 1, dtype=np.float64) ** -exponent
    edges = np.cumsum(share / share.sum())
    lengths = rng.integers(1, 6, captions)
    drawn = np.minimum(np.searchsorted(edges, rng.random(int(lengths.sum()))), concepts - 1)
    names = {int(number): concept(int(number)) for number in np.unique(drawn)}
    joints = rng.integers(0, len(BETWEEN), len(drawn))
    texts, truth, start = [], [], 0
    for length in lengths.tolist():
        held = [names[number] for number in drawn[start : start + length].tolist()]
        text = "A " + held[0]
        for name, joint in zip(held[1:], joints[start + 1 : start + length].tolist(), strict=True):
            text += BETWEEN[joint] + name
        texts.append(text + ".")
        truth.append(held)
        start += length
    return texts, truth


def plainly(truth: Sequence[Sequence[str]], min_count: int, max_per_concept: int, seed: int) -> set[int]:
    """Return the captions that the filter's definition keeps, computed step by step from the rarest concept upward."""
    captions_of: dict[str, list[int]] = {}
    for caption, concepts in enumerate(truth):
        for name in set(concepts):
            captions_of.setdefault(name, []).append(caption)
    pool: set[int] = set()
    for name in sorted(captions_of, key=lambda name: (len(captions_of[name]), name)):
        captions = captions_of[name]
        if len(captions) < min_count:
            continue
        if len(captions) > max_per_concept:
            rng = random.Random(f"{seed} {name}")
            numbered = sorted((rng.random(), caption) for caption in captions)
            captions = [caption for _, caption in numbered[:max_per_concept]]
        pool.update(captions)
    return pool


def record(number: int, caption: str) -> dict[str, Any]:
    """Return an example in the format of LLaVA's captions for pretraining."""
    human = {"from": "human", "value": "Describe the picture briefly.\n<image>"}
    turns = [human, {"from": "gpt", "value": caption}]
    return {"id": f"{number:09d}", "image": f"{number // 1000:05d}/{number:09d}.jpg", "conversations": turns}


def measure(data: Path, out: Path) -> dict[str, Any]:
    """Run the command on a file, and return its seconds, its peak memory in bytes, and the figures that it printed."""
    took = measured(["filter", str(data), str(out), "--concepts", "simple", "--json"])
    said = json.loads(took.stdout)
    return {
        "seconds": round(took.seconds, 1),
        "peak_bytes": took.peak_bytes,
        "heavy_imports": took.loaded,
        "captions_after": said["captions_after"],
        "concepts_before": said["concepts_before"],
        "concepts_counted": said["concepts_counted"],
        "concepts_after": said["concepts_after"],
        "bands": said["bands"],
    }


def main() -> int:
    """Write the captions, filter them and compare; return 1 if a bound is exceeded or the kept captions differ."""
    parser = argparse.ArgumentParser(description="Measure `qllava filter` on synthetic captions (Linux only).")
    parser.add_argument("--captions", type=int, default=1_000_000)
    parser.add_argument("--concepts", type=int, default=1_000_000)
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, required=True, help="folder for the captions and the filtered file")
    parser.add_argument("--out", type=Path, help="file to write the figures to, as JSON")
    arguments = parser.parse_args()
    texts, truth = make(arguments.captions, arguments.concepts, arguments.exponent)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    data, out = arguments.folder / "captions.json", arguments.folder / "balanced.json"
    records = [record(number, text) for number, text in enumerate(texts)]
    data.write_text(json.dumps(records), encoding="utf-8")
    found = measure(data, out)
    kept = plainly(truth, 3, 100, 0)
    expected = [one for number, one in enumerate(records) if number in kept]
    result = {
        **provenance("cpu"),
        "captions_before": arguments.captions,
        "exponent": arguments.exponent,
        "file_bytes": data.stat().st_size,
        **found,
        "as_defined": json.loads(out.read_text(encoding="utf-8")) == expected,
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    within = found["seconds"] <= SECONDS and found["peak_bytes"] <= BYTES
    return 0 if within and result["as_defined"] else 1


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
