"""`make advisories`, with a stand-in for pip-audit: silence is no good sign. And the tests that SECURITY.md names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house_rules import ROOT

CASES = {
    "nothing is known": ("exit 0", 0, "knows of no weakness"),
    "a weakness": ("echo 'pillow 1.0 PYSEC-1' > $report; exit 1", 2, "the weaknesses above"),
    "no network": ("echo 'ConnectionError: no route' >&2; exit 1", 2, "could not be asked, so nothing is known"),
    "killed": ("kill -9 $$", 2, "could not be asked, so nothing is known"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said(case: str, tmp_path: Path) -> None:
    does, status, said = CASES[case]
    for program, text in (
        ("bin/python", f'exec "{sys.executable}" "$@"'),
        ("audit/bin/pip-audit", f"while [ $# -gt 0 ]; do [ $1 = --output ] && report=$2; shift; done; {does}"),
    ):
        path = tmp_path / "venv" / program
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    for stamp in (".qllava-installed", ".qllava-audit"):  # in this order: the second is made from the first
        (tmp_path / "venv" / stamp).touch()
    line = [
        "make",
        "-s",
        "-C",
        str(ROOT),
        "advisories",
        f"VENV={tmp_path / 'venv'}",
        f"REPORT={tmp_path / 'found.txt'}",
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == status and said in done.stdout + done.stderr, done
    assert ("PYSEC-1" in done.stdout) == (case == "a weakness")
    assert ("no weakness" in done.stdout) == (status == 0)


def test_every_guarantee_names_a_test_that_is_there() -> None:
    table = re.findall(r"^\| .* \|$", (ROOT / "SECURITY.md").read_text(encoding="utf-8"), re.M)[1:]
    assert len(table) >= 10
    for line in table:
        named = re.findall(r"`(tests/[\w/]+\.py)`", line)
        assert named and all((ROOT / name).is_file() for name in named), line
