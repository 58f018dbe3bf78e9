"""Key figures of a run, for the top of its report and the end of its terminal output.

`command.json` is written when a run starts or is resumed: the command, including the launcher of several processes, the
versions of the packages that compute, and the seconds of all starts so far.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from qllava.config import InputError
from qllava.files import read_json, write_whole
from qllava.runs import COMMAND_FILE, SAMPLES_FILE, Run
from qllava.training.durable import processes
from qllava.training.durable.checkpoints import saving

PACKAGES = ("qllava", "torch", "transformers", "trl", "peft", "bitsandbytes")


class Started:
    """One start of a run: its command, and the duration of it and all starts before it.

    A start whose work was resumed counts in full; after `kill -9` it counts until it was last saved.
    """

    def __init__(self, folder: Path, held: ExitStack) -> None:
        """Start the timer.

        Args:
            folder: Folder of the run.
            held: When it closes, however the run ended, the time is saved once more.
        """
        self._folder, self._began, self._begun = folder, time.monotonic(), False
        self._earlier = 0.0
        if Run(folder).state == "interrupted":
            before = read_json(folder / COMMAND_FILE)
            self._earlier = float(before.get("seconds", 0.0)) if isinstance(before, dict) else 0.0
        held.callback(self._end)

    @property
    def seconds(self) -> float:
        """Seconds of all starts of the run so far."""
        return round(self._earlier + time.monotonic() - self._began, 1)

    def keep(self) -> None:
        """Write `command.json`; called on all ranks."""
        self._begun = True
        processes.by_main(self._write)

    def _write(self) -> None:
        versions = {name: _version(name) for name in PACKAGES}
        content = {"command": command_of(sys.argv, os.environ), "versions": versions, "seconds": self.seconds}
        # After each checkpoint, because a disk may have become full or read-only since.
        with saving(str(self._folder / COMMAND_FILE)):
            write_whole(self._folder / COMMAND_FILE, json.dumps(content, indent=1) + "\n")

    def _end(self) -> None:
        """Save the time of an interrupted run; a finished one has its time in `results.json`."""
        # Without waiting for the other ranks, which may have ended.
        if self._begun and processes.is_main() and not Run(self._folder).finished:
            with suppress(OSError, InputError):  # must not hide the error that ended the run
                self._write()


def command_of(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return the command of a process, with a launcher if it is one of several.

    Args:
        words: `sys.argv`.
        environment: Variables of a launcher: WORLD_SIZE, and LOCAL_WORLD_SIZE on several machines.
    """
    script = words[0].endswith(".py")
    here = ["python", *words] if script else [Path(words[0]).name, *words[1:]]
    world, local = environment.get("WORLD_SIZE", "1"), environment.get("LOCAL_WORLD_SIZE", "")
    if not world.isdigit() or int(world) < 2:
        return shlex.join(here)
    machines = int(world) // int(local) if local.isdigit() and int(local) else 1
    several = ["--num_machines", str(machines)] if machines > 1 else []
    return shlex.join(["accelerate", "launch", "--num_processes", world, *several, *(here[1:] if script else here)])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def figures(folder: Path, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return label and value of each figure of a finished run; figures that were not measured say so or are omitted."""
    tuned = Run(folder).has_adapter
    found = [("Held-out accuracy", _accuracy(results, tuned)), ("Held-out loss", _loss(results))]
    if "seconds" in results:
        found.append(("Time", duration(results["seconds"])))
    if results.get("tokens_per_second"):
        found.append(("Training speed", f"{results['tokens_per_second']:,.0f} tokens/s"))
    started = read_json(folder / COMMAND_FILE)
    if started:
        found.append(("Command", str(started.get("command", ""))))
        versions = started.get("versions", {})
        found.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return [(label, value) for label, value in found if value]


def _accuracy(results: Mapping[str, Any], tuned: bool) -> str:
    share = results.get("eval_exact_match")
    if share is None:
        unknown = tuned and not {"stage2", "eval_loss"} & results.keys()
        return "not measured (no eval_file)" if unknown else ""
    low, high = results["ci95"]
    return f"{share:.1%} of {results['n']:,} questions, exact match (95 % interval {low:.1%} to {high:.1%})"


def _loss(results: Mapping[str, Any]) -> str:
    loss = results.get("eval_loss")
    return "" if loss is None else f"{loss:.4f} per learned token"


def duration(seconds: float) -> str:
    """Format seconds as "48 s", "7 min 12 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def next_commands(folder: Path) -> list[str]:
    """Return commands that can follow, with a question of the run's own data if it has one."""
    if not Run(folder).has_adapter:  # stage 1 has only a projector
        return [f"python recipes/finetune_lora.py --projector {shlex.quote(str(folder))} ..."]
    samples = read_json(folder / SAMPLES_FILE)
    sample = samples[0] if isinstance(samples, list) and samples else {}
    image, question = sample.get("image") or "photo.jpg", sample.get("question") or "What is this?"
    place = shlex.quote(str(folder))
    return [
        f"qllava chat {place} --image {shlex.quote(str(image))} --prompt {shlex.quote(str(question))}",
        f"qllava merge {place} {shlex.quote(f'{folder}-merged')}",
        f"python demo/app.py --model {place}",
    ]
