"""A test that is skipped unexpectedly fails continuous integration, with a sentence that names it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import ALLOWED, SHARED, unexpected

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "the reference cases in ../shared/data are not on this machine"
CHROMIUM = "chromium is not installed: run `make system-deps`"


def test_what_may_be_skipped_is_not_mentioned() -> None:
    assert unexpected([("a", f"{reason}: see pyproject") for reason in ALLOWED], "complete", shared=True) == []


@pytest.mark.parametrize(
    ("reason", "ci", "shared", "may"),
    [
        (REFERENCE, "complete", True, False),
        (REFERENCE, "complete", False, True),
        (CHROMIUM, "complete", False, False),
        (CHROMIUM, "without-chromium", True, True),
        ("could not import 'sentencepiece'", "without-chromium", False, False),
        ("playwright is not installed", "complete", True, False),
    ],
)
def test_what_else_is_skipped_is_named(reason: str, ci: str, shared: bool, may: bool) -> None:
    found = unexpected([("tests/a.py::test_b", reason)] * 2, ci, shared=shared)
    assert len(found) == (0 if may else 1)
    assert may or found[0].startswith(f"tests/a.py::test_b was skipped ({reason}), but continuous integration must")


def test_every_reason_is_one_that_a_test_gives() -> None:
    """A list that outlives its tests would let others through."""
    others = [path for path in (ROOT / "tests").rglob("*.py") if path.name not in ("skips.py", "test_skips.py")]
    lines = [line for path in others for line in path.read_text(encoding="utf-8").splitlines()]
    skipping = [line for line in lines if re.search(r"skip|reason=", line)]
    for reason in (*ALLOWED, "../shared/data", "chromium is not installed"):
        assert any(reason in line for line in skipping), reason


@pytest.mark.parametrize(("ci", "status"), [("complete", 1), ("", 0)])
def test_the_run_fails_and_says_so(ci: str, status: int, tmp_path: Path) -> None:
    """The hooks, in a run of its own over two tests in a process of pytest-xdist's, as `make test` has it."""
    path = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    hooks = "from tests.skips import pytest_sessionfinish, pytest_terminal_summary\n"
    (tmp_path / "conftest.py").write_text(path + hooks)
    (tmp_path / "test_x.py").write_text("import pytest\ndef test_y(): pytest.skip('no moon')\ndef test_z(): pass\n")
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "1", str(tmp_path)]
    environment = {**os.environ, "QLLAVA_CI": ci}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    said = "test_x.py::test_y was skipped (no moon), but continuous integration must run it"
    assert (said in done.stdout) == bool(ci)


def test_ci_asks_for_it() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make lint" in script and "make test" in script
    assert "QLLAVA_CI=complete" in script and "QLLAVA_CI=without-chromium" in script
    assert ROOT.parent / "shared" / "data" == SHARED
