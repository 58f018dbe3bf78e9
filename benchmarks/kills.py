"""Test of resuming: thirty `kill -9` in nano runs must not change the final weights.

    python benchmarks/kills.py --out benchmarks/results/kills.json      (about seven minutes on one core)

After each kill the same command resumes the run; at the end its weights are compared with those of an uninterrupted
run. There are two runs over a few hundred of nano's examples, with a checkpoint after every step: stage 1 alone, and
both stages by one command. (In the second, stage 1 saves no checkpoints: its first kill waits for the end of stage 1
and comes before stage 2 saves.) Of the other kills, two of three wait for `.partial`, the folder of a checkpoint that
is being written, and come within 20 ms; the rest come at a random time, or after two more steps. Half of those that
wait for a save let one save pass first, otherwise the run would never advance. A kill counts as one during a save if it
leaves that folder behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.machine import provenance
from qllava.nano.dataset import prepare
from qllava.runs import ADAPTER_FILE, PARTIAL, PROJECTOR_FILE, RESULTS_FILE, STAGE1, Run, step_of
from qllava.surroundings import prepare_process
from qllava.training.durable.checkpoints import fault

ROOT = Path(__file__).resolve().parents[1]
ROWS, JITTER = 320, 0.02
WEIGHTS = (ADAPTER_FILE, PROJECTOR_FILE, f"{STAGE1}/{PROJECTOR_FILE}")
STAGE1_DONE = Path(STAGE1) / RESULTS_FILE


@dataclass(frozen=True)
class Trained:
    """A training command that is killed and resumed."""

    recipe: str
    """File name of the recipe."""
    steps: int
    """Optimizer steps of a stage."""
    kills: int
    """How often it is killed."""
    both: bool
    """Whether it trains both stages."""
    given: tuple[str, ...]
    """Further arguments."""

    def start(self, folder: Path, log: Path) -> subprocess.Popen[str]:
        """Start the command in its own process, as a user would; its output is appended to a log."""
        words = ["--output_dir", folder, "--max_steps", self.steps, "--save_strategy", "steps", "--save_steps", 1]
        words += ["--save_total_limit", 2, "--per_device_train_batch_size", 8, "--eval_strategy", "no", *self.given]
        line = [sys.executable, str(ROOT / "recipes" / self.recipe), *map(str, words)]
        with log.open("a", encoding="utf-8") as file:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            return subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment)


@dataclass(frozen=True)
class Kill:
    """A kill and the state in which it left the run."""

    recipe: str
    """File name of the recipe that was killed."""
    seconds: float
    """Seconds since the command started."""
    in_save: bool
    """Whether a checkpoint was being written."""
    between_stages: bool
    """Whether stage 1 had ended and stage 2 had no checkpoint yet."""
    newest: str | None
    """Name of the newest intact checkpoint; None if there is none."""


def write_records(folder: Path) -> tuple[Path, Path, Path]:
    """Write some of nano's captions and conversations; return both files and the folder of their images."""
    data = prepare()
    files = []
    for path in (data.pretrain, data.train):
        files.append(folder / path.name)
        files[-1].write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))[:ROWS]), encoding="utf-8")
    return files[0], files[1], data.folder


def wait_for_save(process: subprocess.Popen[str], folder: Path, pass_by: int, dice: random.Random) -> None:
    """Wait until a checkpoint is being written, after `pass_by` others."""
    aside, saves, was = folder / PARTIAL, 0, (folder / PARTIAL).exists()
    while process.poll() is None:
        now = aside.exists()
        saves += now and not was
        if saves > pass_by:
            time.sleep(dice.uniform(0, JITTER))
            return
        was = now
        time.sleep(0.001)


def wait_for(process: subprocess.Popen[str], folder: Path, seconds: float) -> None:
    """Wait some seconds, but no longer than two more checkpoints, so that the run lasts for all kills."""
    until, first = time.monotonic() + seconds, newest_step(folder)
    while process.poll() is None and time.monotonic() < until and newest_step(folder) < first + 2:
        time.sleep(0.002)


def wait_for_stage2(process: subprocess.Popen[str], folder: Path, seconds: float) -> None:
    """Wait until stage 1 has ended and some seconds more, but no longer than until stage 2 starts to save."""
    while process.poll() is None and not (folder / STAGE1_DONE).exists():
        time.sleep(0.002)
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until and not (folder / PARTIAL).exists():
        time.sleep(0.001)


def newest_step(folder: Path) -> int:
    """Return the highest step of a checkpoint, or 0 if there is none."""
    return max(map(step_of, Run(folder).checkpoints()), default=0)


def kill_once(run: Trained, folder: Path, log: Path, number: int, longest: float, dice: random.Random) -> Kill:
    """Start the command, kill it, and return what the kill found.

    Raises:
        RuntimeError: If the command ends before it is killed.
    """
    began, clock = time.monotonic(), time.time()
    process = run.start(folder, log)
    if number == 0 and run.both:
        wait_for_stage2(process, folder, dice.uniform(0, 2))
    elif number % 3:
        wait_for_save(process, folder, number % 2, dice)
    else:
        wait_for(process, folder, dice.uniform(0, longest))
    seconds = time.monotonic() - began
    process.kill()
    if process.wait() != -9:
        raise RuntimeError(f"{run.recipe} ended before kill {number}, with status {process.returncode}; see {log}.")
    whole = [place.name for place in Run(folder).checkpoints() if fault(place) is None]
    aside = folder / PARTIAL  # if an earlier kill left it, it is older than this command
    in_save = aside.exists() and aside.stat().st_mtime > clock
    between = (folder / STAGE1_DONE).exists() and not whole
    return Kill(run.recipe, round(seconds, 2), in_save, between, whole[-1] if whole else None)


def differing(a: Path, b: Path) -> tuple[int, list[str]]:
    """Return how many tensors two runs have, and the names of those that are not equal bit for bit."""
    count, names = 0, []
    for file in WEIGHTS:
        if not (a / file).exists() and not (b / file).exists():
            continue
        first, second = load_file(a / file), load_file(b / file)
        count += len(first)
        names += sorted(first.keys() ^ second.keys())
        names += [f"{file}: {n}" for n in first.keys() & second.keys() if not _bits_equal(first[n], second[n])]
    return count, names


def _bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def measure(work: Path, kills: int, seed: int) -> dict[str, object]:
    """Train both runs uninterrupted and with kills, and compare their weights."""
    captions, conversations, images = write_records(work)
    log, dice, told, compared, wrong = work / "said.txt", random.Random(seed), [], 0, []
    first = kills // 3
    rows = ("--image_folder", str(images), "--train_file")
    both = (*rows, str(conversations), "--pretrain_file", str(captions))
    runs = (
        Trained("pretrain_projector.py", 2 * first + 4, first, False, (*rows, str(captions))),
        Trained("finetune_lora.py", 2 * (kills - first) + 4, kills - first, True, both),
    )
    bar = tqdm(total=kills, desc="Kills", unit=" kills", disable=None)
    for number, run in enumerate(runs):
        whole, killed = work / f"whole-{number}", work / f"killed-{number}"
        began = time.monotonic()
        if status := run.start(whole, log).wait():
            raise RuntimeError(f"{run.recipe} failed with status {status}; see {log}.")
        undisturbed = time.monotonic() - began
        for kill in range(run.kills):
            told.append(kill_once(run, killed, log, kill, undisturbed * 0.6, dice))
            bar.update()
        if status := run.start(killed, log).wait():
            raise RuntimeError(f"{run.recipe} failed with status {status} after its kills; see {log}.")
        count, names = differing(whole, killed)
        compared, wrong = compared + count, wrong + names
    bar.close()
    return {
        "kills": len(told),
        "in_saves": sum(kill.in_save for kill in told),
        "between_stages": sum(kill.between_stages for kill in told),
        "tensors_compared": compared,
        "tensors_that_differ": wrong,
        "each": [asdict(kill) for kill in told],
    }


def main() -> int:
    """Run the test, and print and write the result; return 1 if a tensor differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to write the result to, as JSON")
    parser.add_argument("--folder", type=Path, help="folder to train in, which is kept (default: a temporary one)")
    arguments = parser.parse_args()
    work = arguments.folder or Path(tempfile.mkdtemp(prefix="qllava-kills-"))
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found = {**provenance("cpu"), "seed": arguments.seed, **measure(work, arguments.kills, arguments.seed)}
    found["seconds"] = round(time.monotonic() - began)
    print(json.dumps({key: value for key, value in found.items() if key != "each"}, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if not arguments.folder:
        shutil.rmtree(work)
    return 1 if found["tensors_that_differ"] else 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
