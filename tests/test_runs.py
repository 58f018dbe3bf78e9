"""The folder of a run: its kind and state by the files in it, its checkpoints in order, the newest nano run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from qllava import runs
from qllava.config import NANO_IDENTITY, InputError
from qllava.runs import Run, finished_nano_runs, is_checkpoint, step_of


def fill(folder: Path, names: Sequence[str]) -> Run:
    """Make files, and folders for names that end in a slash."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.touch()
    return Run(folder)


@pytest.mark.parametrize(
    ("names", "kind", "state"),
    [
        ((), None, "empty"),
        (("train.json", "config.json"), None, "empty"),
        (("run.yaml",), "stage 1", "begun"),
        (("run.yaml", "checkpoint-2/"), "stage 1", "interrupted"),
        (("run.yaml", "results.json", "projector.safetensors", "checkpoint-2/"), "stage 1", "finished"),
        (("run.yaml", "data.json"), "stage 2", "begun"),
        (("run.yaml", "data.json", "stage1/checkpoint-3/"), "stage 2", "interrupted"),
        (("run.yaml", "data.json", "stage1/run.yaml"), "stage 2", "begun"),
        (("run.yaml", "data.json", "stage1/results.json"), "stage 2", "interrupted"),
        (("run.yaml", "data.json", "adapter_config.json", "results.json"), "stage 2", "finished"),
        (("adapter_config.json", "adapter_model.safetensors", "qllava.json"), "stage 2", "empty"),  # a checkpoint
        (("config.json", "merge.json", "data.json"), "merged", "empty"),
        (("run.yaml", "checkpoint-best/", "checkpoint-/"), "stage 1", "begun"),
    ],
)
def test_kind_and_state(tmp_path: Path, names: Sequence[str], kind: str | None, state: str) -> None:
    run = fill(tmp_path, names)
    assert (run.kind, run.state, run.finished) == (kind, state, state == "finished")


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert (Run(tmp_path / "none").kind, Run(tmp_path / "none").state) == (None, "empty")


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    run = fill(tmp_path, ("checkpoint-10/", "checkpoint-9/", "checkpoint-100/", "checkpoint-x/", "run.yaml"))
    assert run.checkpoints() == [run.checkpoint(step) for step in (9, 10, 100)]
    assert run.checkpoints(after=run.checkpoint(9)) == [run.checkpoint(10), run.checkpoint(100)]
    assert [step_of(path) for path in run.checkpoints()] == [9, 10, 100]
    assert not is_checkpoint(tmp_path / "checkpoint-x") and step_of(tmp_path / "seed-3") == 0


def test_the_nano_runs_that_finished_come_in_order(tmp_path: Path) -> None:
    for number, (name, model) in enumerate({"later": "nano", "first": "nano", "other": "a/llava"}.items()):
        run = fill(tmp_path / name, (runs.RESULTS_FILE, runs.ADAPTER_FILE))
        run.settings.write_text(f"model_name_or_path: {model}\ntokens_per_row: 900\n")
        os.utime(run.results, (100 - number, 100 - number))
    fill(tmp_path / "unfinished", (runs.ADAPTER_FILE,)).settings.write_text("model_name_or_path: nano\n")
    assert finished_nano_runs(tmp_path) == [tmp_path / "first", tmp_path / "later"]
    assert Run(tmp_path / "first").read_settings() == {"model_name_or_path": "nano", "tokens_per_pack": 900}


@pytest.mark.parametrize("text", ["a: [", "- a list\n", ""])
def test_settings_that_cannot_be_read_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(
        InputError,
        match=r"run\.yaml (cannot be read \(.*\)|contains no settings)\. Repair the file or remove the run\.$",
    ):
        Run(tmp_path).read_settings()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), None),
        (("config.json", "model.safetensors"), None),
        (("run.yaml", "data.json"), "is not finished. Run the training command again to resume it."),
        (("run.yaml", "stage1/checkpoint-2/projector.safetensors"), "again to resume it."),
        (("run.yaml", "checkpoint-2/projector.safetensors"), "again to resume it."),
        (
            ("checkpoint-2/adapter_config.json", "checkpoint-10/adapter_config.json"),
            "newest checkpoint, {}/checkpoint-10.",
        ),
        (("run.yaml", "projector.safetensors"), "is a stage 1 run, which has only a projector. Use it with"),
        (("run.yaml", "projector.safetensors", "adapter_config.json"), None),
    ],
)
def test_a_run_that_has_no_model_yet(tmp_path: Path, names: Sequence[str], said: str | None) -> None:
    found = fill(tmp_path, names).without_model
    assert found is None if said is None else said.format(tmp_path) in (found or "")


@pytest.mark.parametrize(
    ("record", "another"),
    [
        ({"fingerprint": f"shapes-vocabulary-{NANO_IDENTITY}"}, False),
        ({"fingerprint": "shapes-vocabulary-another"}, True),
        ({"fingerprint": ""}, True),
        # Not readable: the true reason is given where the run is loaded.
        ({}, False),
        ([], False),
        (None, False),
    ],
)
def test_a_run_says_which_nano_it_was_trained_on(tmp_path: Path, record: object, another: bool) -> None:
    if record is not None:
        (tmp_path / runs.RECORD_FILE).write_text(json.dumps(record))
    assert Run(tmp_path).is_of_another_nano == another
