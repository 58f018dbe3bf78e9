"""Disks that are too small, full in the middle of a save, or read-only; runs cut between two of their last files."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qllava.config import InputError
from qllava.files import write_whole
from qllava.models.lora import Lora
from qllava.runs import Run
from qllava.training import scores
from qllava.training.durable import disk
from qllava.training.durable.checkpoints import fault, newest, saving
from qllava.training.durable.disk import Need
from qllava.training.durable.order import total_steps
from qllava.training.run import finetune, pretrain
from qllava.training.settings import TrainConfig
from tests import commands
from tests.commands import Command
from tests.faults.test_survives import cut, flip, last_step, same, wait_for
from tests.planted import interrupted, planted
from tests.tiny_runs import (
    Tiny,
    flags,
    make_trainer,
    refusal,
    settings,
    stage1_settings,
    stage2_settings,
    write_records,
)

# Without a limit every save adds to what lies there.
LONG: dict[str, Any] = {"max_steps": 40, "save_steps": 2, "save_total_limit": 30}


def equal(a: Path, b: Path) -> bool:
    """Adapter and projector of two runs, bit for bit."""
    for name in ("adapter_model.safetensors", "projector.safetensors"):
        first, second = load_file(a / name), load_file(b / name)
        if first.keys() != second.keys() or not all(torch.equal(first[key], second[key]) for key in first):
            return False
    return True


class TestWhatWillBeWritten:
    @pytest.mark.parametrize("lora", [True, False], ids=["stage 2", "stage 1"])
    def test_is_what_was_written(self, tiny: Tiny, tmp_path: Path, lora: bool) -> None:
        trainer = make_trainer(tiny, tmp_path, lora=lora, max_steps=1, save_strategy="steps", save_steps=1)
        need = disk.needed(trainer.model, trainer.args, trainer.assembled.processor.tokenizer, 8)

        trainer.train()
        sizes = {p.name: p.stat().st_size for p in (tmp_path / "checkpoint-1").iterdir()}
        moments, weights = need.each - need.result, sum(s for n, s in sizes.items() if n.endswith(".safetensors"))
        assert moments <= sizes["optimizer.pt"] <= 1.35 * moments
        assert weights <= need.result
        assert sum(sizes.values()) <= need.each

    def test_lora_that_is_to_come(self, tiny: Tiny, tmp_path: Path) -> None:
        trainer = make_trainer(tiny, tmp_path / "a")
        base = make_trainer(tiny, tmp_path / "b", lora=False)
        tokenizer = base.assembled.processor.tokenizer
        to_come = Lora(4, 8).parameters(base.assembled.model)
        expected = sum(p.numel() for name, p in trainer.model.named_parameters() if "lora_" in name)
        assert to_come == expected
        ahead = disk.needed(base.assembled.model, base.args, tokenizer, 8, lora=to_come)
        assert ahead == disk.needed(trainer.model, trainer.args, tokenizer, 8)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"max_steps": 100, "save_steps": 10}, 10),
            ({"max_steps": 100, "save_steps": 10, "save_total_limit": 2}, 3),
            ({"max_steps": 100, "save_steps": 60, "save_total_limit": 5}, 2),
            ({"max_steps": 100, "save_steps": 0.25}, 4),
            ({"max_steps": 100, "save_strategy": "no"}, 1),
            ({"num_train_epochs": 3, "save_strategy": "epoch"}, 3),
            ({"num_train_epochs": 2, "save_steps": 5, "per_device_train_batch_size": 4}, 4),
        ],
        ids=str,
    )
    def test_checkpoints_at_one_time(self, tmp_path: Path, changes: dict[str, Any], expected: int) -> None:
        values: dict[str, Any] = {"per_device_train_batch_size": 8, "save_total_limit": None, **changes}
        config = TrainConfig(output_dir=str(tmp_path), **values)
        assert disk.at_one_time(config, total_steps(config, 40)) == expected

    def test_checkpoints_that_make_way_count(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / "optimizer.pt").write_bytes(bytes(600))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_600, 400))
        disk.check({tmp_path: Need(1, 900, 100)})
        with pytest.raises(InputError, match="choose another output_dir"):
            disk.check({tmp_path: Need(1, 900, 101)})

    def test_those_of_the_other_stage_stay(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = tmp_path / "stage1"
        (first / "checkpoint-1").mkdir(parents=True)
        (first / "checkpoint-1" / "optimizer.pt").write_bytes(bytes(600))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_600, 400))
        disk.check({first: Need(1, 300, 100), tmp_path: Need(1, 500, 100)})
        with pytest.raises(InputError, match=f"in {tmp_path} "):
            disk.check({tmp_path: Need(1, 400, 100)})


class TestTooSmallADisk:
    def test_is_refused_before_the_first_step(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(InputError) as caught:
            pretrain(stage1_settings(tiny, tmp_path / "run"))
        said = refusal(caught.value)
        assert f" in {tmp_path / 'run'} (up to 2 checkpoints of " in said and "are free. Free disk space" in said
        assert "save_total_limit" in said and not Run(tmp_path / "run").checkpoints()

    def test_for_stage_2_is_refused_before_stage_1(
        self, tiny: Tiny, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first alone would fit."""
        chosen = settings(tiny, tmp_path / "run", pretrain_file=captions, lora_r=64)
        seen: list[dict[Path, Need]] = []
        monkeypatch.setattr(disk, "check", seen.append)
        finetune(chosen)
        together, first, second = seen
        assert together == first | second and [*together] == [tmp_path / "run" / "stage1", tmp_path / "run"]
        assert second[tmp_path / "run"].total > first[tmp_path / "run" / "stage1"].total


@pytest.fixture(scope="module")
def captions(tiny: Tiny) -> Path:
    """What a stage 1 of finetune's own learns from."""
    rows = [
        {"id": f"caption-{number}", "image": f"{number}.png", "conversations": [
            {"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"{colour} square"}]}
        for number, colour in enumerate(("red", "green", "blue", "yellow"))
    ]  # fmt: skip
    return write_records(tiny.rows.with_name("disk_captions.json"), rows)


@pytest.fixture(scope="module")
def long(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """The run that `LONG` asks for, on a disk that is large enough; trained when it is first called for."""
    return cache(lambda: pretrain(stage1_settings(tiny, tmp_path_factory.mktemp("long") / "run", **LONG)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(line, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def started(tiny: Tiny, folder: Path) -> Command:
    """Stage 1 as users start it."""
    return commands.start("recipes/pretrain_projector.py", *flags(tiny, output_dir=folder, **LONG))


def ended(process: Command) -> str:
    """The one sentence on stderr, behind the bars, of a command that ends with status 1."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    (said,) = [line for line in errors.splitlines() if line.startswith("qllava: ")]
    return said


def fill(place: Path, left: int) -> Path:
    """Take all room on a disk but so many bytes."""
    ballast = place / "ballast"
    with ballast.open("wb") as file:  # the run takes some of it meanwhile
        while (free := shutil.disk_usage(place).free - left) > 0:
            file.write(bytes(min(free, 1 << 20)))
            file.flush()
    return ballast


@contextmanager
def read_only(place: Path, process: Command) -> Iterator[None]:
    """Let a disk be read-only under its path, though a run holds a lock on it.

    A file that is open for writing keeps a file system from becoming read-only, so a second mount of the same files,
    which is read-only, takes the path from the first. The run is stopped meanwhile: it would open files in the second.
    """
    process.send_signal(signal.SIGSTOP)
    subprocess.run(["mount", "--bind", str(place), str(place)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        process.send_signal(signal.SIGCONT)
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


class TestARealDisk:
    """A file system that fills, or becomes read-only, under a run: what was saved is whole, and the run goes on."""

    def unharmed(self, folder: Path) -> Path:
        assert all(fault(place) is None for place in Run(folder).checkpoints())
        found, skipped = newest(folder)
        assert found is not None and not skipped and not (folder / "results.json").exists()
        return found

    def test_fills_in_the_middle_of_a_save(self, tiny: Tiny, small_disk: Path, long: Callable[[], Path]) -> None:
        folder = small_disk / "run"
        process = started(tiny, folder)
        wait_for(process, folder, 5)
        ballast = fill(small_disk, left=80_000)  # for a line of figures, but not for a checkpoint
        said = ended(process)
        found = self.unharmed(folder)
        failed = folder / f"checkpoint-{int(found.name.removeprefix('checkpoint-')) + 2}"
        assert said.startswith(f"qllava: The checkpoint {failed} could not be saved (")
        hint = "Free disk space, or make the folder writable, and run the command again."
        assert said.endswith(f"Earlier checkpoints are unchanged. {hint}")
        with pytest.raises(InputError, match="are free. Free disk space"):
            pretrain(stage1_settings(tiny, folder, **LONG))
        assert self.unharmed(folder) == found
        ballast.unlink()
        pretrain(stage1_settings(tiny, folder, **LONG))
        assert same(folder, long())

    def test_becomes_read_only(self, tiny: Tiny, small_disk: Path, long: Callable[[], Path]) -> None:
        folder = small_disk / "run"
        process = started(tiny, folder)
        wait_for(process, folder, 5)
        with read_only(small_disk, process):
            said = ended(process)
            assert "could not be saved (" in said and "Read-only file system" in said
            found = self.unharmed(folder)
            with pytest.raises(InputError) as caught:
                pretrain(stage1_settings(tiny, folder, **LONG))
            assert refusal(caught.value) == f"The run cannot be written to {folder}: Read-only file system."
            assert self.unharmed(folder) == found and last_step(folder) >= 5
        pretrain(stage1_settings(tiny, folder, **LONG))
        assert same(folder, long())


class TestTheEndOfARun:
    @pytest.mark.parametrize(("operation", "last"), [("rename", "report.html"), ("write", "README.md")])
    def test_is_not_finished_before_its_report(self, tiny: Tiny, tmp_path: Path, operation: Any, last: str) -> None:
        folder = tmp_path / "run"
        with planted(operation, str(folder / last), interrupted), pytest.raises(KeyboardInterrupt):
            finetune(stage2_settings(tiny, folder))
        assert not (folder / "results.json").exists()
        finetune(stage2_settings(tiny, folder))
        assert all((folder / name).is_file() for name in ("results.json", "report.html", "README.md"))
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "Results:" in card and '"eval_loss"' in card and equal(folder, tiny.stage2)


class TestDamageAcrossStages:
    @pytest.fixture(scope="class")
    def whole(self, tiny: Tiny, captions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Both stages by one command, a checkpoint after each second step of each."""
        return finetune(settings(tiny, tmp_path_factory.mktemp("both") / "run", pretrain_file=captions))

    @pytest.fixture
    def unfinished(self, whole: Path, tmp_path: Path) -> Path:
        """A copy that has lost the end of stage 2."""
        folder = tmp_path / "run"
        shutil.copytree(whole, folder)
        for name in ("results.json", "adapter_model.safetensors", "projector.safetensors"):
            (folder / name).unlink()
        return folder

    @pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped", "removed"])
    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "rng_state.pth"])
    def test_in_stage_2(
        self,
        tiny: Tiny,
        captions: Path,
        whole: Path,
        unfinished: Path,
        damage: Callable[[Path], None],
        name: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        damage(unfinished / "checkpoint-4" / name)
        finetune(settings(tiny, unfinished, pretrain_file=captions))
        said = capsys.readouterr().out
        assert f"checkpoint-4: {name}" in said
        assert f"Resuming from {unfinished / 'checkpoint-2'}." in said and "Stage 1" not in said
        assert equal(unfinished, whole)

    def test_in_stage_1(
        self, tiny: Tiny, captions: Path, whole: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for place in Run(unfinished).checkpoints():
            shutil.rmtree(place)
        (unfinished / "stage1" / "results.json").unlink()
        flip(unfinished / "stage1" / "checkpoint-4" / "optimizer.pt")
        finetune(settings(tiny, unfinished, pretrain_file=captions))
        said = capsys.readouterr().out
        assert f"Resuming from {unfinished / 'stage1' / 'checkpoint-2'}." in said
        assert equal(unfinished, whole)

    def between(self, unfinished: Path) -> Path:
        """The run ended after stage 1, and before the first checkpoint of stage 2."""
        for place in Run(unfinished).checkpoints():
            shutil.rmtree(place)
        return unfinished

    def test_between_the_stages(self, tiny: Tiny, captions: Path, whole: Path, unfinished: Path) -> None:
        """LoRA begins with what it began with where one process did both."""
        finetune(settings(tiny, self.between(unfinished), pretrain_file=captions))
        assert equal(unfinished, whole)

    def test_a_change_between_the_stages(self, tiny: Tiny, captions: Path, unfinished: Path) -> None:
        with pytest.raises(InputError) as caught:
            finetune(settings(tiny, self.between(unfinished), pretrain_file=captions, seed=7))
        assert f"{unfinished / 'stage1'} was started with other data or settings: seed was" in refusal(caught.value)


class TestWhatCannotBeSaved:
    @pytest.mark.parametrize("error", [SafetensorError("Error while serializing"), RuntimeError("a"), OSError(5, "b")])
    def test_is_one_sentence_whichever_library_says_so(self, error: Exception) -> None:
        with pytest.raises(InputError, match="^The checkpoint could not be saved "), saving("The checkpoint"):
            raise error

    def test_an_error_of_a_gpu_is_none_of_the_disk(self) -> None:
        with pytest.raises(torch.AcceleratorError), saving("x"):
            raise torch.AcceleratorError("an illegal memory access")

    def test_a_small_file_is_there_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "scores.json"
        write_whole(path, "{}")

        def full(self: Path, text: str, **_: Any) -> int:
            self.write_bytes(text[:2].encode())
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, "[1, 2]")
        assert path.read_text() == "{}" and [*tmp_path.iterdir()] == [path]

    def test_damaged_scores_are_measured_again(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoint-2").mkdir()  # so that the run is resumed
        assert scores._kept(tmp_path) == {}
        for text, kept in (('{"untrai', {}), ('{"untrained": 0.5}', {"untrained": 0.5})):
            (tmp_path / "scores.json").write_text(text)
            assert scores._kept(tmp_path) == kept
