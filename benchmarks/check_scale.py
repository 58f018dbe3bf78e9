"""Benchmark of time and memory for checking a large data file, and for starting a run on it a second time.

    python benchmarks/check_scale.py --rows 600000 --images 5000 --out benchmarks/results/check_scale.json

The examples are synthetic: LLaVA's JSON with random words, 200 tokens of text per example on average, distributed as in
LLaVA-Instruct (log-normal), and several examples per image. Five commands are measured, each in its own process:

    first       `qllava check` with an empty cache: examples are read and every image is decoded
    edited      the same after an example was added: images are cached, all examples are read again
    again       the same file a second time
    run         a training run of one step on nano's parts, whose tokenizer encodes the examples differently
    run_again   the same run a second time: the whole command, from its start to its report
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qllava.surroundings import prepare_process

STARTS, ENDS = ("b", "st", "c", "tr", "gr", "l", "wh", "m"), ("at", "ing", "ere", "ou")
WORDS = [f"{start}{end}" for start in STARTS for end in ENDS]


def make(folder: Path, rows: int, images: int) -> Path:
    """Write images and examples, and return the path of the data file."""
    images_folder = folder / "images"
    images_folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for n in range(images):
        path = images_folder / f"{n:06d}.jpg"
        if not path.exists():
            small = noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(small).resize((640, 480)).save(path, quality=85)
    rng = random.Random(0)
    data = folder / "rows.json"
    with data.open("w", encoding="utf-8") as file:
        for n in range(rows):
            row = _row(rng, n, rng.randrange(images))
            file.write(("[" if n == 0 else ",\n") + json.dumps(row))
        file.write("]\n")
    return data


def _row(rng: random.Random, number: int, image: int) -> dict[str, Any]:
    length = min(700, max(12, round(rng.lognormvariate(4.4, 0.55))))
    rounds = rng.choice((1, 1, 2, 4))
    turns: list[dict[str, str]] = []
    for k in range(rounds):
        question = " ".join(rng.choices(WORDS, k=10))
        answer = " ".join(rng.choices(WORDS, k=max(2, length // rounds - 10)))
        turns.append({"from": "human", "value": f"<image>\n{question}?" if k == 0 else f"{question}?"})
        turns.append({"from": "gpt", "value": f"{answer}."})
    return {"id": f"example-{number}", "image": f"images/{image:06d}.jpg", "conversations": turns}


def measure(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a command, and return its seconds and the peak memory of its processes together, in bytes."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    most = own = 0
    while process.poll() is None:
        found = [_memory(pid) for pid in _tree(process.pid)]
        most, own = max(most, sum(pss for pss, _ in found)), max(own, sum(anonymous for _, anonymous in found))
        time.sleep(0.25)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return {"seconds": round(time.monotonic() - started, 1), "peak_bytes": most, "peak_anonymous_bytes": own}


def _tree(root: int) -> list[int]:
    """Return the ids of a process and all of its descendants."""
    found = [root]
    for pid in found:
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # the process has just ended
            continue
    return found


def _memory(pid: int) -> tuple[int, int]:
    """Return the proportional set size of a process (shared memory is counted once) and its anonymous part, in bytes.

    The rest are pages of mapped files: the system's cache, which it reclaims when memory is needed.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss")}
    return sizes.get("Pss:", 0), sizes.get("Pss_Anon:", 0)


def main() -> int:
    """Write the data, measure the commands, and print and write the result."""
    parser = argparse.ArgumentParser(description="Measure time and memory for checking a large data file (Linux only).")
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--tokenizer", required=True, help="file or folder of a tokenizer, such as LLaMA's")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/qllava/benchmark-check")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data = make(arguments.folder, arguments.rows, arguments.images)
    cache = arguments.folder / "cache"
    subprocess.run(["rm", "-rf", str(cache)], check=True)
    environment = {**os.environ, "QLLAVA_CACHE": str(cache)}
    command = [sys.executable, "-m", "qllava", "check", str(data), "--tokenizer", arguments.tokenizer, "--json"]
    command += ["--template", "vicuna_v1"]
    found = {"first": measure(command, environment)}
    with data.open("r+", encoding="utf-8") as file:
        file.seek(data.stat().st_size - 2)
        file.write(",\n" + json.dumps(_row(random.Random(1), arguments.rows, 0)) + "]\n")
    for name in ("edited", "again"):
        found[name] = measure(command, environment)
    run = [sys.executable, "recipes/pretrain_projector.py", "--train_file", str(data), "--template", "chatml"]
    run += ["--too_long", "drop", "--max_steps", "1"]  # nano's tokenizer needs several tokens for each of these words
    run += ["--output_dir", str(cache / "run"), "--overwrite_output_dir", "True"]
    for name in ("run", "run_again"):
        found[name] = measure(run, environment)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "rows": arguments.rows,
        "images": arguments.images,
        "file_bytes": data.stat().st_size,
        "rows_per_second_edited": round((arguments.rows + 1) / found["edited"]["seconds"]),
        **found,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
