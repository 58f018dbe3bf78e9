"""What is wrong with a command line is said before torch, or anything else that takes seconds, is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import commands
from tests.wrong_commands import PROGRAMS, WRONG, prepare

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wrong")
    prepare(place)
    return place


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Any:
    """All of them in one process, from a folder where nothing else is."""
    lines = [(program, words.format(folder=folder).split()) for program, words, _, _ in WRONG]
    lines += [(program, ["--help"]) for program in PROGRAMS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.wrong_commands"],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=folder / "empty",
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[f"{program} {words}" for program, words, _, _ in WRONG])
def test_a_wrong_command_is_one_sentence(number: int, outcome: Any, folder: Path) -> None:
    _, _, status, expected = WRONG[number]
    found = outcome["results"][number]
    assert expected.format(folder=folder) in found["said"] and "Traceback" not in found["said"], found
    assert found["status"] == status
    if status == 1:
        assert found["said"].count("\n") == 1 and found["said"].endswith((".\n", "?\n")), found["said"]


@pytest.mark.parametrize("number", range(len(PROGRAMS)), ids=PROGRAMS)
def test_every_program_has_a_help(number: int, outcome: Any) -> None:
    found = outcome["results"][len(WRONG) + number]
    assert found["status"] in (0, None) and found["said"].startswith("usage: "), found


def test_nothing_heavy_was_imported(outcome: Any) -> None:
    assert outcome["heavy"] == []


def test_nothing_was_made(outcome: Any, folder: Path) -> None:
    made = {
        "rows.json",
        "key.yaml",
        "type.yaml",
        "choice.yaml",
        "empty",
        "finished",
        "adapter",
        "halfway",
        "aligning",
        "aligned",
    }
    assert {path.name for path in folder.iterdir()} == made and not list((folder / "empty").iterdir())


def test_make_finetune_after_a_finished_run(tmp_path: Path) -> None:
    """Status 0, and where the result is; with arguments, or before it has finished, the recipe runs."""
    (tmp_path / "pyproject.toml").touch()
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "recipe: $*"\n')
    python.chmod(0o755)
    (tmp_path / "venv" / ".qllava-installed").touch()

    def make(*words: str) -> str:
        line = ["make", "-s", "-f", str(ROOT / "Makefile"), "VENV=venv", "finetune", *words]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout

    assert make() == "recipe: recipes/finetune_lora.py\n"
    results = tmp_path / "runs" / "finetune_lora" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text("{}")
    said = make()
    assert "is finished" in said and "runs/finetune_lora/report.html" in said and "--overwrite_output_dir" in said
    again = "--overwrite_output_dir"
    assert make(f"ARGS={again}") == f"recipe: recipes/finetune_lora.py {again}\n"


def test_check_and_inspect_need_neither_peft_nor_bitsandbytes(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "examples.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    program = """
import sys
for name in ("peft", "bitsandbytes"):
    sys.modules[name] = None  # as if it were not installed
from qllava.cli import main
sys.exit(main(["check", "examples.json"]) or main(["inspect", "examples.json", "--json"]))
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = commands.run("-c", program, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Ready" in done.stdout and '"input_ids"' in done.stdout
