"""What a run says of its starts: the command, with a launcher of several processes, and the time of all of them."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from qllava.config import DataConfig, InputError, ModelConfig
from qllava.training import folders, outcome, samples
from qllava.training.settings import Settings, TrainConfig
from tests.planted import full, interrupted, planted
from tests.tiny_runs import Tiny


@pytest.mark.parametrize(
    ("words", "environment", "command"),
    [
        (["recipes/a.py", "--seed", "1"], {}, "python recipes/a.py --seed 1"),
        (["/usr/bin/qllava-x", "a b"], {"WORLD_SIZE": "1"}, "qllava-x 'a b'"),
        (
            ["recipes/a.py", "--seed", "1"],
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"},
            "accelerate launch --num_processes 4 recipes/a.py --seed 1",
        ),
        (
            ["recipes/a.py"],
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
            "accelerate launch --num_processes 8 --num_machines 2 recipes/a.py",
        ),
    ],
)
def test_the_command(words: list[str], environment: dict[str, str], command: str) -> None:
    assert outcome.command_of(words, environment) == command


def test_both_recipes_record_it(tiny: Tiny) -> None:
    for folder in (tiny.stage1, tiny.stage2):
        kept = json.loads((folder / outcome.COMMAND_FILE).read_text(encoding="utf-8"))
        assert kept["command"] and kept["versions"]["torch"] and kept["seconds"] >= 0
        found = dict(outcome.figures(folder, {"seconds": 1}))
        assert found["Command"] == kept["command"]


def test_the_seconds_of_all_starts_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def start(seconds: float, *, killed: bool = False) -> float:
        nonlocal now
        with ExitStack() as held:
            started = outcome.Started(tmp_path, held)
            started.keep()
            now += seconds
            found = started.seconds
            if killed:
                held.pop_all()
        return found

    assert start(50) == 50
    assert start(10) == 10, "the first start left nothing to resume"
    (tmp_path / "checkpoint-5").mkdir()
    assert start(20) == 30
    assert start(7, killed=True) == 37
    assert start(5) == 35, "after kill -9 those that were kept count"
    (tmp_path / "results.json").touch()
    before = (tmp_path / outcome.COMMAND_FILE).read_text(encoding="utf-8")
    with ExitStack() as held:
        outcome.Started(tmp_path, held)
    assert (tmp_path / outcome.COMMAND_FILE).read_text(encoding="utf-8") == before


def test_small_files_are_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """A start that is killed while it writes leaves what the start before it had written."""
    names = ("run.yaml", "data.json", "command.json", "samples.json")
    for name in names:
        (tmp_path / name).write_text("before")

    train: Any = TrainConfig(output_dir=str(tmp_path), use_cpu=True)
    chosen = Settings(ModelConfig(), DataConfig(), train)
    with ExitStack() as held:
        started = outcome.Started(tmp_path, held)
        for write in (
            lambda: folders.begin(chosen, tmp_path, [], []),
            lambda: folders.write_settings(chosen, tmp_path),
            started._write,
            lambda: samples.write(tmp_path, [], [], []),
        ):
            with planted("rename", f"{tmp_path}/*", interrupted), pytest.raises(KeyboardInterrupt):
                write()
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in names} == dict.fromkeys(names, "before")


def test_a_disk_that_is_full_by_now_is_one_sentence(tmp_path: Path) -> None:
    """The command is written again after each checkpoint, when the disk may have changed."""
    with ExitStack() as held:
        started = outcome.Started(tmp_path, held)
        with planted("write", f"{tmp_path}/*", full), pytest.raises(InputError) as error:
            started.keep()
        said = str(error.value)
        assert said.startswith(f"{tmp_path / 'command.json'} could not be saved (") and "No space left" in said
