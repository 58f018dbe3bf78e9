"""Runs `qllava` in a process of its own and tells what it took: seconds, peak memory, and which libraries it loaded."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

# VmHWM counts from the program's own start. The peak of getrusage and wait4 does not: a child has its parent's.
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
    """What a command printed and what it took."""

    stdout: str
    seconds: float
    peak_bytes: int
    loaded: list[str]


def measured(words: Sequence[str]) -> Command:
    """Run `qllava WORDS...` on Linux; what it says on stderr is kept from the screen.

    Raises CalledProcessError, with what it said, where it fails.
    """
    began = time.monotonic()
    line = [sys.executable, "-c", MEASURED, *words]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - began
    return Command(done.stdout, seconds, **json.loads(done.stderr.splitlines()[-1]))
