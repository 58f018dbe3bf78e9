"""Forked commands are what `python` would have run: words, folder, environment, output, signals, status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import commands

SAYS = """
import json, os, pathlib, sys
print(json.dumps([sys.argv, str(pathlib.Path.cwd()), os.environ["OF_ITS_OWN"], __name__, sys.stdin.read()]))
print("to stderr", file=sys.stderr)
"""


def run(program: str | Path, *words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    line, environment = [str(program), *map(str, words)], {**os.environ, "OF_ITS_OWN": "here"}
    given = subprocess.DEVNULL
    return subprocess.run(line, cwd=folder, env=environment, stdin=given, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [["-u", "says.py", "a b"], ["-c", SAYS, "--flag", ""], ["-m", "says"]])
def test_an_interpreter_that_is_forked_runs_the_same(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "says.py").write_text(SAYS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        forked, plain = (run(program, *words, folder=tmp_path) for program in (commands.interpreter(), sys.executable))
    assert json.loads(forked.stdout)[2:] == ["here", "__main__", ""]
    assert (forked.stdout, forked.stderr, forked.returncode) == (plain.stdout, plain.stderr, plain.returncode)


@pytest.mark.parametrize(
    ("text", "status"),
    [("import sys; sys.exit(3)", 3), ("1 / 0", 1), ("import os; os.kill(os.getpid(), 9)", -9)],
)
def test_an_interpreter_that_is_forked_ends_the_same(text: str, status: int, tmp_path: Path) -> None:
    done = run(commands.interpreter(), "-c", text, folder=tmp_path)
    assert done.returncode == status == run(sys.executable, "-c", text, folder=tmp_path).returncode
    assert ("ZeroDivisionError" in done.stderr) == (status == 1)


def test_a_signal_is_passed_on() -> None:
    """To a program that has its own answer to it, whatever it has printed by then."""
    text = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('told'), sys.exit(5)))\n"
        "print('ready')\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([commands.interpreter(), "-u", "-c", text], stdout=subprocess.PIPE, text=True) as forked:
        assert forked.stdout is not None and forked.stdout.readline() == "ready\n"
        forked.send_signal(signal.SIGTERM)
        assert forked.stdout.read() == "told\n"
    assert forked.returncode == 5
