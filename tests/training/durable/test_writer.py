"""Checkpoints are written aside, sealed and renamed: the writer alone, with files of two bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qllava.config import InputError
from qllava.runs import MANIFEST_FILE, PARTIAL, Run
from qllava.training.durable.checkpoints import fault
from qllava.training.durable.writer import CheckpointWriter
from tests.tiny_runs import refusal


def write(writer: CheckpointWriter, step: int, **named: Any) -> None:
    """A checkpoint with one file."""

    def save() -> None:
        assert writer.aside is not None
        place = writer.aside / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / "weights").write_bytes(bytes([step, step]))

    writer.write(step, save, **named)


def test_is_whole_and_says_what_it_was_begun_with(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {"seed": 3})
    write(writer, 5, optim="adamw_torch", computed={"halved": 7})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"] and writer.step == 5 and writer.aside is None
    assert fault(tmp_path / "checkpoint-5") is None
    manifest = json.loads((tmp_path / "checkpoint-5" / MANIFEST_FILE).read_text())
    assert manifest["begun_with"] == {"seed": 3} and manifest["computed"] == {"halved": 7}
    assert manifest["optim"] == "adamw_torch" and list(manifest["files"]) == ["weights"]


def test_a_failure_leaves_the_one_before(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {})
    write(writer, 1)

    def full() -> None:
        assert writer.aside == tmp_path / PARTIAL
        raise OSError("No space left on device")

    with pytest.raises(InputError) as caught:
        writer.write(2, full)
    assert "checkpoint-2 could not be saved (No space left on device)" in refusal(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"] and writer.step == 1 and writer.aside is None


def test_the_limit_and_what_was_passed_over(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {})
    for step in (1, 2, 9):
        write(writer, step)
    (tmp_path / "checkpoint-9" / MANIFEST_FILE).unlink()  # corrupt: the run resumed from 2
    resumed = CheckpointWriter(tmp_path, {})
    resumed.passed_over = [tmp_path / "checkpoint-9"]
    write(resumed, 3, limit=2)
    assert [p.name for p in Run(tmp_path).checkpoints()] == ["checkpoint-2", "checkpoint-3"]
    assert not resumed.passed_over


def test_a_step_that_is_saved_again_replaces_what_was_there(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {})
    write(writer, 4)
    (tmp_path / "checkpoint-4" / "weights").write_bytes(b"")
    writer.passed_over = [tmp_path / "checkpoint-4"]
    write(writer, 4)
    assert fault(tmp_path / "checkpoint-4") is None
