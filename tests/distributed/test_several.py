"""Two processes over gloo equal one; they go on from each other's checkpoints, and end together."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qllava.config import InputError
from qllava.runs import Run
from qllava.training.durable.checkpoints import fault
from qllava.training.run import finetune, pretrain
from tests import commands
from tests.tiny_models import make_tiny_records
from tests.tiny_runs import Tiny, flags, refusal, settings

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
LOSS, WEIGHTS = 1e-5, 1e-4
RUNS = {"pretrain": pretrain, "finetune": finetune}
# Nine examples, four a step: two epochs are six steps, and the third and sixth have one example for two processes.
COMMON: dict[str, Any] = {"lora_dropout": 0, "max_steps": 6, "logging_steps": 1, "save_steps": 2}
FULL: dict[str, Any] = {"load_in_4bit": "false", "learning_rate": 1e-2, "projector_lr": 1e-3}
# Examples of one sample or two: the processes have different numbers of them.
SHORT: dict[str, Any] = {"tokens_per_pack": 90}


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A launcher, on a port that it finds itself; torchrun starts PYTHON_EXEC in place of an interpreter."""
    python = {"PYTHON_EXEC": str(commands.interpreter())}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **python}
    return commands.run("-m", *command, env=environment)


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_same(folder: Path, other: Path) -> None:
    """Loss of every step, and the weights at the end."""
    here, there = losses(folder), losses(other)
    assert here.keys() == there.keys() and len(here) == COMMON["max_steps"]
    apart = max(abs(here[step] - there[step]) for step in here)
    for name in ("projector.safetensors", "adapter_model.safetensors"):
        if (folder / name).exists() or (other / name).exists():
            mine, its = load_file(folder / name), load_file(other / name)
            assert mine.keys() == its.keys()
            difference = max(float((mine[key] - its[key]).abs().max()) for key in mine)
            print(f"{folder.name} and {other.name}: {name} {difference:.1e}, loss {apart:.1e}")
            assert difference <= WEIGHTS
    assert apart <= LOSS


def held_out(folder: Path) -> dict[int, list[float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    names = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_exact_match")
    return {line["step"]: [line[name] for name in names] for line in lines if "eval_loss" in line}


def unfinished(run: Path, folder: Path) -> Path:
    """A copy that was stopped after its second step, in the middle of an epoch."""
    shutil.copytree(run, folder)
    for place in Run(folder).checkpoints()[1:]:
        shutil.rmtree(place)
    for name in ("results.json", "projector.safetensors", "adapter_model.safetensors"):
        (folder / name).unlink(missing_ok=True)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 2]
    (folder / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
    return folder


class Runs:
    """The runs of one process, made here, and those of two, of one start."""

    def __init__(self, tiny: Tiny, folder: Path) -> None:
        self.tiny, self.folder = tiny, folder
        self.rows = make_tiny_records(folder, rows=9)
        content = json.loads(self.rows.read_text(encoding="utf-8"))
        for number, row in enumerate(content):
            row["image"] = f"{number // 2}.png"  # two questions about each image
        self.rows.write_text(json.dumps(content), encoding="utf-8")
        self.planned: list[dict[str, Any]] = []

    def fields(self, recipe: str, **fields: Any) -> dict[str, Any]:
        stage2 = {"projector": self.tiny.stage1} if recipe == "finetune" else {}
        return {"train_file": self.rows, **COMMON, **stage2, **fields}

    def one(self, name: str, recipe: str, **fields: Any) -> Path:
        """A run of one process."""
        return RUNS[recipe](settings(self.tiny, self.folder / name, **self.fields(recipe, **fields)))

    def plan(self, name: str, recipe: str, fault: str | None = None, **fields: Any) -> None:
        """One of two processes, for `start`."""
        out = self.folder / name
        line = flags(self.tiny, **self.fields(recipe, **fields), output_dir=out)
        self.planned.append({"recipe": recipe, "flags": line, "out": str(out), "fault": fault})

    def start(self) -> None:
        """All runs that are planned."""
        listed = self.folder / "runs.json"
        listed.write_text(json.dumps(self.planned), encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # What torchrun gives to each; real launchers are started in test_launched.
        given = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        both = [
            commands.start("tests/distributed/several.py", listed, env={**given, "RANK": rank, "LOCAL_RANK": rank})
            for rank in ("0", "1")
        ]
        said = [process.communicate(timeout=300) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        self.said = "".join(out for out, _ in said)

    def ended(self, name: str) -> list[dict[str, Any]]:
        """What became of a run in each of the two processes."""
        return [json.loads(Path(f"{self.folder / name}.{n}.json").read_text(encoding="utf-8")) for n in (0, 1)]


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tiny, tmp_path_factory.mktemp("several"))
    runs.one("one_stage1", "pretrain", per_device_train_batch_size=4)
    runs.plan("two_stage1", "pretrain", per_device_train_batch_size=2)
    runs.one("one_full", "finetune", per_device_train_batch_size=4, **FULL)
    runs.plan("two_full", "finetune", per_device_train_batch_size=2, **FULL)
    runs.plan("two_accumulated", "finetune", per_device_train_batch_size=1, gradient_accumulation_steps=2, **FULL)
    runs.plan("two_short", "finetune", per_device_train_batch_size=2, **FULL, **SHORT)
    evaluated = {"eval_file": runs.rows, "eval_strategy": "steps", "eval_steps": 3, "eval_questions": 4}
    runs.one("one_4bit", "finetune", per_device_train_batch_size=4, per_device_eval_batch_size=9, **evaluated)
    # Nine held-out examples in rounds of four: in the last round the second process has none.
    runs.plan("two_4bit", "finetune", per_device_train_batch_size=2, per_device_eval_batch_size=2, **evaluated)
    for name, recipe, fields in (("stage1", "pretrain", {}), ("full", "finetune", FULL)):
        unfinished(runs.folder / f"one_{name}", runs.folder / f"then_two_{name}")
        runs.plan(f"then_two_{name}", recipe, per_device_train_batch_size=2, **fields)
    runs.plan("nan", "finetune", fault="nan", per_device_train_batch_size=2, **FULL)
    runs.plan("signal", "finetune", fault="signal", per_device_train_batch_size=2, **FULL, save_strategy="no")
    broken = runs.folder / "broken"
    broken.mkdir()
    for file in (*runs.rows.parent.glob("*.png"), runs.rows):
        shutil.copy(file, broken)
    (broken / "4.png").write_bytes(b"no image")  # of the last example alone
    more = {"train_file": broken / "rows.json", "skip_check": "true"}
    runs.plan("unreadable", "finetune", per_device_train_batch_size=2, **FULL, **more)
    runs.start()
    return runs


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("one_stage1", "two_stage1"),
        ("one_full", "two_full"),
        ("one_full", "two_accumulated"),
        ("one_full", "two_short"),
        ("one_4bit", "two_4bit"),
        ("one_stage1", "then_two_stage1"),
        ("one_full", "then_two_full"),
    ],
)
def test_two_processes_equal_one(runs: Runs, one: str, two: str) -> None:
    assert [end["raised"] for end in runs.ended(two)] == [None, None]
    assert_same(runs.folder / one, runs.folder / two)


def test_held_out_figures_are_those_of_one_process(runs: Runs) -> None:
    one, two = (held_out(runs.folder / name) for name in ("one_4bit", "two_4bit"))
    assert one.keys() == two.keys() == {3, 6}
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5)


@pytest.mark.parametrize(("name", "recipe", "fields"), [("stage1", "pretrain", {}), ("full", "finetune", FULL)])
def test_one_process_goes_on_where_two_stopped(
    runs: Runs, name: str, recipe: str, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = unfinished(runs.folder / f"two_{name}", runs.folder / f"then_one_{name}")
    runs.one(stopped.name, recipe, per_device_train_batch_size=2, gradient_accumulation_steps=2, **fields)
    assert f"Resuming from {stopped / 'checkpoint-2'}." in capsys.readouterr().out
    assert_same(runs.folder / f"one_{name}", stopped)


def test_another_number_of_samples_per_step_is_refused(runs: Runs, tmp_path: Path) -> None:
    stopped = unfinished(runs.folder / "two_stage1", tmp_path / "run")
    with pytest.raises(InputError) as caught:
        pretrain(settings(runs.tiny, stopped, **runs.fields("pretrain", per_device_train_batch_size=2)))
    assert "samples_per_step was 4 and is 2" in refusal(caught.value)


def test_the_main_process_alone_writes_and_speaks(runs: Runs) -> None:
    said = Counter(
        line for line in runs.said.splitlines() if line.startswith(("Stage 1 is finished", "The run is finished"))
    )
    assert said and set(said.values()) == {1}
    for place in Run(runs.folder / "two_full").checkpoints():
        assert fault(place) is None
        written = json.loads((place / "manifest.json").read_text(encoding="utf-8"))["files"]
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= written.keys()


def test_a_loss_of_one_process_that_is_not_finite_stops_both(runs: Runs) -> None:
    first, second = runs.ended("nan")
    assert (first["raised"], second["raised"]) == ("NotFinite", "Elsewhere")
    assert "at step 4, with the samples row-" in first["said"]
    assert [place.name for place in Run(runs.folder / "nan").checkpoints()] == ["checkpoint-2"]


def test_a_signal_to_one_process_stops_both_at_the_same_step(runs: Runs) -> None:
    ends = runs.ended("signal")
    assert [end["raised"] for end in ends] == ["Stopped", "Stopped"]
    assert all("saved at step 4 and stopped by SIGTERM" in end["said"] for end in ends)
    (saved,) = Run(runs.folder / "signal").checkpoints()
    assert saved.name == "checkpoint-4" and fault(saved) is None


def test_an_image_that_one_process_cannot_read_ends_both(runs: Runs) -> None:
    ends = sorted(runs.ended("unreadable"), key=lambda end: end["raised"])
    assert [end["raised"] for end in ends] == ["Elsewhere", "InputError"]
    assert "row-8" in ends[1]["said"]
