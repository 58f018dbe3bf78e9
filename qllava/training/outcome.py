"""What a run came to, for the top of its report and the end of its output on the terminal.

`command.json` is written when a run starts or is resumed: the command as it was typed, and the versions of the packages
that compute.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

COMMAND_FILE = "command.json"
SAMPLES_FILE = "samples.json"
ADAPTER_CONFIG = "adapter_config.json"
PACKAGES = ("qllava", "torch", "transformers", "trl", "peft", "bitsandbytes")


def keep_command(folder: Path) -> None:
    """Write down the command of this process, and the versions of the packages that compute."""
    script = sys.argv[0].endswith(".py")
    command = shlex.join(["python", *sys.argv] if script else [Path(sys.argv[0]).name, *sys.argv[1:]])
    content = {"command": command, "versions": {name: _version(name) for name in PACKAGES}}
    (folder / COMMAND_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def figures(folder: Path, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return label and value of each figure of a finished run; what was not measured says so or is left out."""
    tuned = (folder / ADAPTER_CONFIG).is_file()
    found = [("Held-out accuracy", _accuracy(results, tuned)), ("Held-out loss", _loss(results))]
    if "seconds" in results:
        found.append(("Time", duration(results["seconds"])))
    if results.get("tokens_per_second"):
        found.append(("Training speed", f"{results['tokens_per_second']:,.0f} tokens/s"))
    started = _read(folder / COMMAND_FILE)
    if started:
        found.append(("Command", str(started.get("command", ""))))
        versions = started.get("versions", {})
        found.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return [(label, value) for label, value in found if value]


def _accuracy(results: Mapping[str, Any], tuned: bool) -> str:
    share = results.get("eval_exact_match")
    if share is None:
        unknown = tuned and not {"stage2", "eval_loss"} & results.keys()
        return "not measured, because there was no eval_file" if unknown else ""
    low, high = results["ci95"]
    return f"{share:.1%} of {results['n']:,} questions, exact match (95 % interval {low:.1%} to {high:.1%})"


def _loss(results: Mapping[str, Any]) -> str:
    loss = results.get("eval_loss")
    return "" if loss is None else f"{loss:.4f} per learned token"


def duration(seconds: float) -> str:
    """Seconds as a person says them: "48 s", "7 min 12 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def next_commands(folder: Path) -> list[str]:
    """Return what may be typed next, with a question of the run's own where it has one."""
    if not (folder / ADAPTER_CONFIG).is_file():  # a stage 1 is only a projector
        return [f"python recipes/finetune_lora.py --projector {shlex.quote(str(folder))} ..."]
    samples = _read(folder / SAMPLES_FILE)
    sample = samples[0] if isinstance(samples, list) and samples else {}
    image, question = sample.get("image") or "photo.jpg", sample.get("question") or "What is this?"
    place = shlex.quote(str(folder))
    return [
        f"qllava chat {place} --image {shlex.quote(str(image))} --prompt {shlex.quote(str(question))}",
        f"qllava merge {place} {shlex.quote(f'{folder}-merged')}",
        f"python demo/app.py --model {place}",
    ]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
