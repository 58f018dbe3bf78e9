"""Measurement of one `qllava` command in its own process: seconds, peak memory, and which libraries it loaded."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

# VmHWM counts from the program's own start. The peak of getrusage and wait4 does not: a child inherits its parent's.
MEASURED = """
import json, pathlib, sys
from qllava.cli import main
status = main(sys.argv[1:])
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
loaded = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps({"peak_bytes": peak, "loaded": loaded}), file=sys.stderr)
sys.exit(status)
"""


@dataclass(frozen=True)
class Command:
    """Output and cost of one command."""

    stdout: str
    """What it printed on stdout."""
    seconds: float
    """Wall-clock time."""
    peak_bytes: int
    """Peak resident memory."""
    loaded: list[str]
    """Which of torch and transformers it imported."""


def measured(words: Sequence[str]) -> Command:
    """Run `qllava WORDS...` and measure it (Linux only). Its stderr is not shown.

    Raises:
        CalledProcessError: If the command fails; it holds the command's output.
    """
    began = time.monotonic()
    line = [sys.executable, "-c", MEASURED, *words]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - began
    return Command(done.stdout, seconds, **json.loads(done.stderr.splitlines()[-1]))
