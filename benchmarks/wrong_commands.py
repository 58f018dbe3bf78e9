"""Benchmark of wrong commands: their exit status, the time to the message, and the message.

    python benchmarks/wrong_commands.py                 # writes benchmarks/results/wrong_commands.json, prints a table

Each command runs in its own process. `wall` is the time from start to end, the best of three; `cpu` is the user and
system time of the same process, the figure to compare on a machine with other work; `load` is the machine's load.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qllava.runs import RESULTS_FILE, RUN_FILE
from qllava.surroundings import prepare_process

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "wrong_commands.json"

# Program and arguments; {folder} is the folder of the files that `_prepare` writes.
COMMANDS = (
    ("recipes/finetune_lora.py", "--per_device_batch_size 4"),
    ("recipes/finetune_lora.py", "--lora_r many"),
    ("recipes/finetune_lora.py", "--template vicuna"),
    ("recipes/finetune_lora.py", "--config {folder}/none.yaml"),
    ("recipes/finetune_lora.py", "--config {folder}/key.yaml"),
    ("recipes/finetune_lora.py", "--train_file {folder}/none.json"),
    ("recipes/finetune_lora.py", "--train_file https://example.org/train.json"),
    ("recipes/finetune_lora.py", "--train_file {folder}/rows.json --image_folder {folder}/none"),
    ("recipes/finetune_lora.py", "--output_dir {folder}/finished"),
    ("recipes/finetune_lora.py", "--output_dir {folder}/rows.json/run"),
    ("recipes/finetune_lora.py", "--model_name_or_path ./none --train_file {folder}/rows.json"),
    ("recipes/finetune_lora.py", "--report_to wandb"),
    ("recipes/finetune_lora.py", "--optim schedule_free_adamw"),
    ("recipes/finetune_lora.py", "--neftune_noise_alpha 5"),
    ("recipes/finetune_lora.py", "--per_device_train_batch_size 0"),
    ("recipes/finetune_lora.py", "--num_train_epochs 0"),
    ("recipes/finetune_lora.py", "--lr_scheduler_type cosine_with_min_lr"),
    ("recipes/pretrain_projector.py", "--langauge_model x"),
    ("-m qllava", "check {folder}/none.json"),
    ("-m qllava", "check {folder}/rows.json --image-dir x"),
    ("-m qllava", "plan --config {folder}/none.yaml"),
    ("-m qllava", "merge {folder}/none {folder}/out"),
    ("-m qllava", "chat nano --image {folder}/none.jpg"),
    ("-m qllava", "eval vqa nano {folder}/none.json"),
    ("demo/app.py", "--model ./none"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all commands; return 1 if one succeeds, or ends in a stack trace."""
    parser = argparse.ArgumentParser(description="Measure the time until wrong commands are refused.")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, default=RESULT, help=f"file to write to (default: {RESULT.name})"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _prepare(folder)
        rows = [_measure(program, words, folder) for program, words in COMMANDS]
    found = {"load": [round(load, 1) for load in os.getloadavg()], "cores": os.cpu_count(), "commands": rows}
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("| command | status | wall, s | cpu, s | message |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| `{row['command']}` | {row['status']} | {row['wall']:.2f} | {row['cpu']:.2f} | {row['message']} |")
    return int(any(row["status"] == 0 or "Traceback" in row["message"] for row in rows))


def _prepare(folder: Path) -> None:
    (folder / "rows.json").write_text("[]")
    (folder / "key.yaml").write_text("model: x\n")
    (folder / "finished").mkdir()
    for name in (RESULTS_FILE, RUN_FILE):
        (folder / "finished" / name).write_text("{}")


def _measure(program: str, words: str, folder: Path) -> dict[str, Any]:
    """Return the figures of the fastest of three runs of one command."""
    best: dict[str, Any] = {}
    for _ in range(3):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [sys.executable, *program.split(), *words.format(folder=folder).split()],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        message = re.sub(r"\s+", " ", done.stderr.strip().splitlines()[-1].replace(f"{folder}/", ""))
        shown = f"{program.replace('-m qllava', 'qllava')} {words.replace('{folder}/', '')}"
        found = {"command": shown, "status": done.returncode, "wall": wall, "cpu": cpu, "message": message}
        if not best or wall < best["wall"]:
            best = found
    return {**best, "wall": round(best["wall"], 3), "cpu": round(best["cpu"], 3)}


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
