"""What `accelerate launch` starts with recipes/accelerate: the engine that is named there, or a sentence."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from qllava.config import InputError
from qllava.runs import MANIFEST_FILE, Run
from qllava.training.durable.checkpoints import seal
from tests.distributed.test_several import FULL, ROOT, Runs, assert_same, start, unfinished
from tests.security.test_models import Bomb
from tests.tiny_runs import Tiny, flags

CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny, tmp_path_factory.mktemp("launched"))


def launch(runs: Runs, config: str, script: list[str], name: str, **fields: Any) -> subprocess.CompletedProcess[str]:
    """A run of stage 2 in two processes."""
    chosen = runs.fields("finetune", per_device_train_batch_size=2, **fields)
    line = flags(runs.tiny, **chosen, output_dir=runs.folder / name)
    given = ["--config_file", f"recipes/accelerate/{config}.yaml", "--main_process_port", "0"]
    return start(["accelerate.commands.launch", *given, *script, *line])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert str(config.distributed_type.value) == yaml.safe_load(path.read_text(encoding="utf-8"))["distributed_type"]
    assert config.num_processes == 2


@pytest.mark.distributed
def test_ddp_equals_one_process(runs: Runs) -> None:
    done = launch(runs, "ddp_2gpu", ["recipes/finetune_lora.py"], "ddp", **FULL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("The run is finished") == 1
    runs.one("one", "finetune", per_device_train_batch_size=4, **FULL)
    assert_same(runs.folder / "one", runs.folder / "ddp")


@pytest.mark.distributed
def test_fsdp2_with_4bit_weights_equals_one_process_and_goes_on(runs: Runs) -> None:
    done = launch(runs, "fsdp2_qlora", ["tests/distributed/sharded.py", "finetune"], "fsdp")
    assert done.returncode == 0, done.stdout + done.stderr
    runs.one("one_4bit", "finetune", per_device_train_batch_size=4)
    assert_same(runs.folder / "one_4bit", runs.folder / "fsdp")
    stopped = unfinished(runs.folder / "fsdp", runs.folder / "fsdp_again")
    done = launch(runs, "fsdp2_qlora", ["tests/distributed/sharded.py", "finetune"], stopped.name)
    assert done.returncode == 0 and "Resuming from" in done.stdout, done.stdout + done.stderr
    assert_same(runs.folder / "one_4bit", stopped)


@pytest.mark.distributed
def test_fsdp_is_not_quietly_something_else(runs: Runs) -> None:
    """Without GPUs accelerate makes it DDP."""
    done = launch(runs, "fsdp2_qlora", ["recipes/finetune_lora.py"], "no_fsdp")
    assert done.returncode != 0
    assert done.stderr.count("qllava: accelerate is configured for FSDP") >= 1
    assert not Run(runs.folder / "no_fsdp").checkpoints()


@pytest.mark.distributed
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: see pyproject")
class TestZero2:
    ZERO2 = ("deepspeed_zero2", ["tests/distributed/zero.py", "finetune"])

    @pytest.fixture(scope="class")
    def zero2(self, runs: Runs) -> Path:
        """A run of two processes."""
        done = launch(runs, *self.ZERO2, "zero2", **FULL)
        assert done.returncode == 0, done.stdout + done.stderr
        return runs.folder / "zero2"

    def test_equals_one_process_and_goes_on(self, runs: Runs, zero2: Path) -> None:
        one = runs.one("one_zero2", "finetune", per_device_train_batch_size=4, **FULL)
        assert_same(one, zero2)
        stopped = unfinished(zero2, runs.folder / "zero2_again")
        done = launch(runs, *self.ZERO2, stopped.name, **FULL)
        assert done.returncode == 0 and "Resuming from" in done.stdout, done.stdout + done.stderr
        assert_same(one, stopped)

    def test_a_loss_that_is_not_finite_stops_it(self, runs: Runs, zero2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """DeepSpeed looks at the gradient before it steps, and the run at the loss after it: no weight was changed."""
        monkeypatch.setenv("FAULT", "nan")
        done = launch(runs, *self.ZERO2, "zero2_nan", **FULL)
        assert done.returncode != 0 and "qllava: The loss is nan at step 4, with the samples row-" in done.stderr
        assert [place.name for place in Run(runs.folder / "zero2_nan").checkpoints()] == ["checkpoint-2"]

    def test_what_is_no_tensor_is_not_unpickled(self, runs: Runs, zero2: Path) -> None:
        stopped = unfinished(zero2, runs.folder / "zero2_pickle")
        (place,) = Run(stopped).checkpoints()
        begun = json.loads((place / MANIFEST_FILE).read_text(encoding="utf-8"))
        (place / MANIFEST_FILE).unlink()
        marks = list(place.glob("global_step*/*_optim_states.pt"))
        assert len(marks) == 2
        for number, path in enumerate(marks):
            torch.save({"x": Bomb(runs.folder / f"ran-{number}")}, path)
        seal(place, begun["begun_with"], begun["optim"])
        done = launch(runs, *self.ZERO2, stopped.name, **FULL)
        assert done.returncode != 0 and "contains pickled objects, which qllava never loads" in done.stderr
        assert not list(runs.folder.glob("ran-*"))

    def test_other_engines_do_not_go_on_with_it(self, runs: Runs, zero2: Path) -> None:
        stopped = unfinished(zero2, runs.folder / "zero2_alone")
        with pytest.raises(InputError, match="was saved under DeepSpeed, and this process runs without them"):
            runs.one(stopped.name, "finetune", per_device_train_batch_size=4, **FULL)
