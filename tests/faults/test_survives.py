"""Runs that are killed, stopped, or whose checkpoints were damaged: the same command goes on, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qllava.config import NANO_IDENTITY, InputError, ModelConfig
from qllava.conversation import CHATML
from qllava.runs import BEGUN_FILE, MANIFEST_FILE, PARTIAL, Run
from qllava.training.durable.checkpoints import (
    begun_with,
    fault,
    newest,
    publish,
    refuse_changes,
    rotate,
    seal,
)
from qllava.training.durable.signals import SaveAndStop, Stopped
from qllava.training.fitting import fitted
from qllava.training.run import pretrain
from qllava.training.stages import INSTRUCTION, Stage
from tests import commands
from tests.commands import Command
from tests.planted import planted
from tests.tiny_runs import Tiny, flags, make_trainer, refusal, stage1_settings

SLOWLY: dict[str, Any] = {"max_steps": 60, "save_steps": 3, "save_total_limit": 2}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "projector.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def unfinished(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the finished stage 1 that has lost its end; its checkpoints are those of steps 2 and 4."""
    folder = tmp_path / "run"
    shutil.copytree(tiny.stage1, folder)
    for name in ("results.json", "projector.safetensors"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that `SLOWLY` asks for, never interrupted."""
    return pretrain(stage1_settings(tiny, tmp_path_factory.mktemp("whole") / "run", **SLOWLY))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Killed(BaseException):
    """Nothing runs after a kill; no code catches this."""


class TestDamagedCheckpoints:
    @pytest.mark.parametrize("name", ["projector.safetensors", "optimizer.pt", "trainer_state.json", MANIFEST_FILE])
    @pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped", "removed"])
    def test_is_noticed(self, unfinished: Path, damage: Callable[[Path], None], name: str) -> None:
        place = unfinished / "checkpoint-4"
        assert fault(place) is None
        damage(place / name)
        found, (said,) = newest(unfinished)
        assert found == unfinished / "checkpoint-2"
        assert said.startswith(f"Skipping the corrupt checkpoint {place}: ")
        assert name == MANIFEST_FILE or name in said

    @pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped", "removed"])
    def test_the_run_goes_on_from_the_one_before(
        self,
        tiny: Tiny,
        unfinished: Path,
        capsys: pytest.CaptureFixture[str],
        damage: Callable[[Path], None],
    ) -> None:
        damage(unfinished / "checkpoint-4" / "optimizer.pt")
        pretrain(stage1_settings(tiny, unfinished))
        said = capsys.readouterr().out
        assert "checkpoint-4: optimizer.pt" in said
        assert f"Resuming from {unfinished / 'checkpoint-2'}." in said
        assert same(unfinished, tiny.stage1)
        assert fault(unfinished / "checkpoint-4") is None and not (unfinished / ".partial").exists()

    def test_none_is_whole(self, tiny: Tiny, unfinished: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for place in Run(unfinished).checkpoints():
            flip(place / "projector.safetensors")
        pretrain(stage1_settings(tiny, unfinished))
        said = capsys.readouterr().out
        assert (
            said.count("Skipping the corrupt checkpoint") == 2
            and "No intact checkpoint found; restarting the stage." in said
        )
        assert same(unfinished, tiny.stage1)


class TestRotation:
    def make(self, folder: Path, step: int) -> Path:
        place = folder / ".partial" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / "weights").write_bytes(bytes(100))
        seal(place, {})
        publish(place, folder / place.name)
        shutil.rmtree(place.parent)
        return folder / place.name

    def test_never_takes_the_last_whole_one(self, tmp_path: Path) -> None:
        first, second, third = (self.make(tmp_path, step) for step in (1, 2, 3))
        for broken in (second, third):
            cut(broken / "weights")
        rotate(tmp_path, 1)
        assert Run(tmp_path).checkpoints() == [first, second, third]
        fourth = self.make(tmp_path, 4)
        rotate(tmp_path, 1)
        assert Run(tmp_path).checkpoints() == [fourth] and not (tmp_path / ".partial").exists()

    @pytest.mark.parametrize("limit", [2, None])
    @pytest.mark.parametrize("step", [573, 600])
    def test_one_that_was_passed_over_counts_for_nothing(self, tmp_path: Path, step: int, limit: int | None) -> None:
        """Its sizes are right: only who reads it finds the fault, and goes on from one before."""
        before, damaged = self.make(tmp_path, 550), self.make(tmp_path, step)
        flip(damaged / "weights")
        found, _ = newest(tmp_path)
        assert found == before and Run(tmp_path).checkpoints(after=before) == [damaged]
        saved = self.make(tmp_path, 580)
        rotate(tmp_path, limit, [damaged])
        assert Run(tmp_path).checkpoints() == [before, saved]

    def test_keeps_all_without_a_limit(self, tmp_path: Path) -> None:
        made = [self.make(tmp_path, step) for step in (1, 2)]
        rotate(tmp_path, None)
        assert Run(tmp_path).checkpoints() == made

    @pytest.mark.parametrize("killed", [True, False], ids=["killed", "failed"])
    def test_a_second_save_of_a_step_that_does_not_end_keeps_the_first(self, tmp_path: Path, killed: bool) -> None:
        """It is the only one under a limit of 1; between the two renames neither has the name."""
        first, failures = self.make(tmp_path, 1), iter([Killed() if killed else OSError(28, "No space left on device")])

        def once() -> None:
            for failure in failures:  # the first may then get its name back
                raise failure

        with planted("rename", str(first), once), pytest.raises(Killed if killed else OSError):
            self.make(tmp_path, 1)
        assert first.exists() != killed
        with pytest.raises(InputError, match="was started with other data or settings"):
            refuse_changes(tmp_path, {"seed": 1})
        assert newest(tmp_path) == (first, [])

    def test_a_corrupt_one_that_made_way_stays_away(self, tmp_path: Path) -> None:
        first = self.make(tmp_path, 1)
        cut(first / "weights")
        (tmp_path / PARTIAL).mkdir()
        first.rename(tmp_path / PARTIAL / "old-checkpoint-1")
        assert newest(tmp_path) == (None, [])

    def test_one_of_the_same_name_makes_way(self, tmp_path: Path) -> None:
        cut(self.make(tmp_path, 1) / "weights")
        assert fault(self.make(tmp_path, 1)) is None


class TestWhatHasChanged:
    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("seed", 7, "seed was 42 and is 7"),
            ("learning_rate", 0.5, "learning_rate was nothing and is 0.5"),
            ("max_steps", 5, "max_steps was 4 and is 5"),
        ],
    )
    def test_a_setting(self, tiny: Tiny, unfinished: Path, name: str, value: Any, said: str) -> None:
        before = (unfinished / "run.yaml").read_bytes()
        with pytest.raises(InputError) as caught:
            pretrain(stage1_settings(tiny, unfinished, **{name: value}))
        assert "checkpoint-4 was started with other data or settings" in str(caught.value)
        assert said in refusal(caught.value)
        assert (unfinished / "run.yaml").read_bytes() == before

    def test_the_data(self, tiny: Tiny, unfinished: Path) -> None:
        rows = tiny.rows.with_name("changed") / tiny.rows.name
        rows.parent.mkdir()
        rows.write_text(tiny.rows.read_text(encoding="utf-8").replace("red", "grey"), encoding="utf-8")
        with pytest.raises(InputError) as caught:
            pretrain(stage1_settings(tiny, unfinished, train_file=rows, image_folder=tiny.rows.parent))
        assert "file 1 of train_file was " in refusal(caught.value)

    def test_what_changes_nothing_may_change(self, tiny: Tiny, unfinished: Path) -> None:
        """And it counts from here on: the steps between checkpoints are not what the checkpoint was told."""
        shutil.rmtree(unfinished / "checkpoint-4")
        pretrain(stage1_settings(tiny, unfinished, save_steps=1, logging_steps=2, tokens_per_pack=200))
        assert [place.name for place in Run(unfinished).checkpoints()] == [f"checkpoint-{step}" for step in (2, 3, 4)]
        assert same(unfinished, tiny.stage1)

    def test_how_samples_are_drawn(self, tiny: Tiny, unfinished: Path) -> None:
        with pytest.raises(InputError) as caught:
            pretrain(stage1_settings(tiny, unfinished, share_image_prefix=False))
        assert "share_image_prefix was True and is False" in refusal(caught.value)

    def test_files_are_known_by_their_bytes_and_their_order(self, tiny: Tiny, tmp_path: Path) -> None:
        def begun(*files: tuple[str, str], **others: Any) -> dict[str, Any]:
            hashes = [{"file": name, "sha256": sha} for name, sha in files]
            return begun_with(stage1_settings(tiny, tmp_path), train_file=hashes, **others)

        once = begun(("a", "1"), ("b", "2"))
        assert begun(("renamed", "1"), ("b", "2")) == once
        assert begun(("b", "2"), ("a", "1")) != once
        assert begun(("same", "1"), ("same", "2")) != begun(("same", "3"), ("same", "2"))
        assert begun(("same", "1"), pretrain_file=[{"file": "same", "sha256": "2"}]) != begun(("same", "1"))

    @pytest.mark.parametrize("known", [{}, {"nano": "another"}], ids=["before identities", "another identity"])
    def test_the_nano_of_another_version(self, tiny: Tiny, tmp_path: Path, known: dict[str, str]) -> None:
        now = begun_with(replace(stage1_settings(tiny, tmp_path), model=ModelConfig()))
        assert now.pop("nano") == NANO_IDENTITY
        (tmp_path / BEGUN_FILE).write_text(json.dumps({"begun_with": {**now, **known}}))
        with pytest.raises(InputError, match="another base than the nano of this version"):
            refuse_changes(tmp_path, {**now, "nano": NANO_IDENTITY, "seed": 7})
        (tmp_path / BEGUN_FILE).write_text(json.dumps({"begun_with": {**now, "nano": NANO_IDENTITY}}))
        refuse_changes(tmp_path, {**now, "nano": NANO_IDENTITY})

    def test_the_optimizer_that_memory_chose_stays(self, tiny: Tiny, unfinished: Path) -> None:
        """The state of another would end the run at its first step."""
        place = unfinished / "checkpoint-4"
        content = json.loads((place / MANIFEST_FILE).read_text())
        assert content["optim"] == "adamw_torch_fused"
        (place / MANIFEST_FILE).write_text(json.dumps({**content, "optim": "paged_adamw_8bit"}))
        trainer = make_trainer(tiny, unfinished)
        stage = Stage(INSTRUCTION, CHATML, Any, None, [], unfinished, trainer.args, {})  # type: ignore[arg-type]
        chosen, _ = fitted(stage, trainer.model, trainer.assembled, place)
        assert chosen.config.optim == "paged_adamw_8bit"
        assert fitted(stage, trainer.model, trainer.assembled)[0].config.optim == "adamw_torch_fused"

    def test_a_scale_of_fp16_is_of_no_use_elsewhere(self, tiny: Tiny, unfinished: Path) -> None:
        torch.save({"scale": 65536.0}, unfinished / "checkpoint-4" / "scaler.pt")
        make_trainer(tiny, unfinished)._load_scaler(str(unfinished / "checkpoint-4"))

    def test_another_machine(self, tiny: Tiny, unfinished: Path, tmp_path: Path) -> None:
        """Model, data and the run lie in other places there."""
        there = tmp_path / "there"
        for given in (tiny.language_model, tiny.tower):
            shutil.copytree(given, there / given.name)
        for file in [tiny.rows, *tiny.rows.parent.glob("*.png")]:
            shutil.copy(file, there)
        shutil.rmtree(unfinished / "checkpoint-4")
        run = there / "another_name"
        unfinished.rename(run)
        parts = {"language_model": there / tiny.language_model.name, "vision_tower": there / tiny.tower.name}
        pretrain(stage1_settings(tiny, run, train_file=there / tiny.rows.name, **parts))
        assert same(run, tiny.stage1)


class TestTheLastStep:
    @pytest.mark.parametrize("steps", [3, 4], ids=["within an epoch", "at its end"])
    def test_is_not_followed_by_another(self, tiny: Tiny, tmp_path: Path, steps: int) -> None:
        """A run that ended between its last checkpoint and its result."""
        fields = {"max_steps": steps, "save_steps": 1, "lr_scheduler_type": "constant"}
        run = pretrain(stage1_settings(tiny, tmp_path / "run", **fields))
        before = weights(run)
        for name in ("results.json", "projector.safetensors"):
            (run / name).unlink()
        pretrain(stage1_settings(tiny, run, **fields))
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run).items())
        assert Run(run).checkpoints()[-1].name == f"checkpoint-{steps}" and last_step(run) == steps


def start(tiny: Tiny, folder: Path, **fields: Any) -> Command:
    """The recipe as users start it, in a process of its own, and those that it starts."""
    line = flags(tiny, output_dir=folder, **SLOWLY, **fields)
    return commands.start("recipes/pretrain_projector.py", *line, together=True)


def last_step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def wait_for(process: Command, folder: Path, step: int) -> None:
    """Until a step was logged, or the run has ended."""
    while process.poll() is None and last_step(folder) < step:
        time.sleep(0.02)


def killed_and_continued(tiny: Tiny, folder: Path, kills: int) -> None:
    """Kill it now and then, every other time as soon as a checkpoint is being written; then let it end."""
    dice = random.Random(0)
    for number in range(kills):
        began = time.time()
        process = start(tiny, folder)
        wait_for(process, folder, 1 + (number + 1) * (SLOWLY["max_steps"] - 8) // (kills + 1))
        saves = folder / PARTIAL
        while number % 2 and process.poll() is None and not (saves.exists() and saves.stat().st_mtime > began):
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.01 if number % 2 else 0.05))
        process.kill()
        process.communicate()
    process = start(tiny, folder)
    said, _ = process.communicate()
    assert process.returncode == 0 or "contains a finished run" in said, said


class TestKilled:
    @pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
    def test_ends_with_the_same_bits(self, tiny: Tiny, whole: Path, tmp_path: Path, kills: int) -> None:
        killed_and_continued(tiny, tmp_path / "run", kills)
        assert same(whole, tmp_path / "run")
        assert all(fault(place) is None for place in Run(tmp_path / "run").checkpoints())


class TestSignals:
    @pytest.mark.parametrize(
        ("number", "status"),
        [
            (signal.SIGTERM, 143),
            (signal.SIGINT, 130),
            (signal.SIGUSR1, 75),
        ],
        ids=["SIGTERM", "SIGINT", "SIGUSR1"],
    )
    def test_saves_and_ends_within_two_steps(
        self, tiny: Tiny, whole: Path, tmp_path: Path, number: signal.Signals, status: int
    ) -> None:
        """Sent to all its processes, the loader's workers too, as terminals, launchers and schedulers do it."""
        folder = tmp_path / "run"
        process = start(tiny, folder, dataloader_num_workers=2)
        wait_for(process, folder, 4)
        before = last_step(folder)
        os.killpg(process.pid, number)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == status, said
        saved, skipped = newest(folder)
        assert saved is not None and not skipped
        step = int(saved.name.removeprefix("checkpoint-"))
        assert before <= step <= before + 2
        assert f"saved at step {step} and stopped by {number.name}" in said and "Traceback" not in said
        assert not (folder / "results.json").exists()
        if number == signal.SIGTERM:
            process = start(tiny, folder)
            said, _ = process.communicate()
            assert process.returncode == 0 and f"Resuming from {saved}." in said
            assert same(whole, folder)

    def test_after_the_last_step_is_saved_too(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where nothing else is: it came when the step's end was over."""
        folder = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(SaveAndStop, "on_step_end", lambda *_, **__: None)
            patch.setattr(SaveAndStop, "agree", lambda self: "SIGTERM")
            with pytest.raises(Stopped, match="saved at step 4 and stopped by SIGTERM"):
                pretrain(stage1_settings(tiny, folder, save_strategy="no"))
        (saved,) = Run(folder).checkpoints()
        assert saved.name == "checkpoint-4" and fault(saved) is None
        pretrain(stage1_settings(tiny, folder, save_strategy="no"))
        assert same(folder, tiny.stage1)

    def test_before_the_first_step_ends_at_once(self, tiny: Tiny, tmp_path: Path) -> None:
        process = start(tiny, tmp_path / "run")
        while process.poll() is None and not (tmp_path / "run" / "run.yaml").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 143 and "Traceback" not in said, said
