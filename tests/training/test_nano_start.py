"""Own data on nano's parts: whose projector is taken, what is said, and what a resumed run takes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from qllava.config import NANO_IDENTITY, DataConfig, InputError, ModelConfig
from qllava.training.nano_start import take_projector
from qllava.training.settings import Settings
from tests.tiny_runs import refusal


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def finished(name: str, second: int, model: str = "nano", identity: str = NANO_IDENTITY) -> Path:
    """A finished run, as far as it is looked at."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    for file in ("results.json", "adapter_model.safetensors"):
        (folder / file).write_text("{}")
    (folder / "run.yaml").write_text(f"model_name_or_path: {model}\n")
    (folder / "qllava.json").write_text(json.dumps({"fingerprint": f"shapes-vocabulary-{identity}"}))
    os.utime(folder / "results.json", (second, second))
    return folder.absolute()


def taken(folder: str = "runs/mine", model: dict[str, Any] | None = None, **data: Any) -> str | None:
    chosen = ModelConfig(**(model or {}))
    given: Any = None
    take_projector(Settings(chosen, DataConfig(**{"train_file": "mine.json", **data}), given), Path(folder))
    return chosen.projector


def test_of_the_newest_finished_nano_run(capsys: pytest.CaptureFixture[str]) -> None:
    finished("old", 1)
    newest = finished("new", 3)
    finished("other", 5, model="llava")
    assert taken() == str(newest)
    assert (
        capsys.readouterr().out
        == f"Using the projector of the finished nano run {newest}; LoRA is newly initialized.\n"
    )


def test_where_there_is_none_stage_1_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert taken() is None
    said = capsys.readouterr().out
    assert "No nano run in runs/ can be used" in said and "stage 1 trains the projector first" in said


def test_not_of_a_run_on_another_nano(capsys: pytest.CaptureFixture[str]) -> None:
    usable = finished("usable", 1)
    other = finished("other", 3, identity="another")
    assert taken() == str(usable)
    (usable / "results.json").unlink()
    capsys.readouterr()
    assert taken() is None
    said = capsys.readouterr().out
    assert f"The projector of {other} is not used" in said and "stage 1 trains the projector first" in said


def test_not_of_the_folder_that_is_written() -> None:
    finished("mine", 1)
    (Path("runs/mine") / "run.yaml").unlink()
    assert taken() is None


def test_a_resumed_run_takes_what_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    first = finished("first", 1)
    Path("runs/mine/checkpoint-50").mkdir(parents=True)
    (Path("runs/mine") / "run.yaml").write_text(yaml.safe_dump({"projector": str(first)}))
    finished("second", 9)
    assert taken() == str(first)
    (Path("runs/mine") / "run.yaml").write_text(yaml.safe_dump({"projector": None}))
    Path("runs/mine/checkpoint-50").rename("runs/mine/stage1")
    (Path("runs/mine/stage1") / "results.json").touch()
    capsys.readouterr()
    assert taken() is None, "it began with a stage 1 of its own"
    assert capsys.readouterr().out == "Using the projector of this run's own stage 1, as before.\n"


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({}, {"train_file": None}),
        ({}, {"pretrain_file": "captions.json"}),
        ({"model_name_or_path": "some/llava"}, {}),
        ({"language_model": "a", "vision_tower": "b"}, {}),
    ],
)
def test_nobody_else_is_given_one(
    model: dict[str, Any], data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    finished("new", 3)
    assert taken(model=model, **data) is None
    assert capsys.readouterr().out == ""


def test_one_that_is_given_stays() -> None:
    finished("new", 3)
    assert taken(model={"projector": "aligned"}) == "aligned"


def test_settings_that_cannot_be_read() -> None:
    Path("runs/mine/checkpoint-1").mkdir(parents=True)
    (Path("runs/mine") / "run.yaml").write_text("- a list")
    with pytest.raises(InputError) as caught:
        taken()
    assert "run.yaml contains no settings" in refusal(caught.value)


def test_a_start_that_left_nothing_to_resume_counts_for_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """It failed on its data, or was finished and is overwritten; its settings are no longer those of a run."""
    Path("runs/mine").mkdir(parents=True)
    (Path("runs/mine") / "run.yaml").write_text(yaml.safe_dump({"projector": None}))
    newest = finished("new", 3)
    assert taken() == str(newest)
    (Path("runs/mine") / "run.yaml").write_text(yaml.safe_dump({"projector": "another"}))
    assert taken() == str(newest)
    assert "No nano run in runs/ can be used" not in capsys.readouterr().out


def test_a_nano_run_that_cannot_be_read_is_not_taken_for_none() -> None:
    (finished("new", 3) / "run.yaml").write_text("{")
    with pytest.raises(InputError) as caught:
        taken()
    assert "Repair the file or remove the run" in refusal(caught.value)
