"""One process does what it is asked, and its errors are its own; several are in tests/distributed."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qllava.config import InputError
from qllava.conversation import CHATML
from qllava.data.collate import weightless_pack
from qllava.training import fitting
from qllava.training.durable import processes
from qllava.training.settings import parse
from qllava.training.stages import INSTRUCTION, Stage
from tests import commands
from tests.tiny_runs import Tiny, make_trainer, refusal

ROOT = Path(__file__).resolve().parents[3]


def test_alone() -> None:
    assert not processes.several() and processes.is_main() and processes.share() == (0, 1)
    assert processes.highest(7) == 7 and processes.every([1, 2]) == [1, 2]
    assert processes.by_main(lambda: "made") == "made"
    made: list[int] = []
    assert processes.main_first(lambda: made.append(1)) is None and made == [1]


@pytest.mark.parametrize("other", [3, 1 << 40])
def test_the_lowest_and_the_highest_of_several(other: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of unequal cards: more than 32 bits hold."""
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "gather", lambda mine: torch.cat([mine, mine.sign() * other]))
    mine = 80 << 30
    assert processes.lowest(mine) == min(mine, other) and processes.highest(mine) == max(mine, other)


def test_unequal_cards_choose_the_same(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits the smallest card: an optimizer of its own on each would give each other weights."""
    trainer = make_trainer(tiny, tmp_path, fit_memory="8GB")
    lengths = np.full(4, 60)
    stage: Any = Stage(INSTRUCTION, CHATML, SimpleNamespace(lengths=lengths), None, [], tmp_path, trainer.args, {})  # type: ignore[arg-type]
    limits: list[int] = []

    def fit(setup: Any, limit: int, **_: Any) -> Any:
        limits.append(limit)
        return SimpleNamespace(tokens_per_pack=64, recompute_layers=0, optim="adamw_torch_fused", peak_bytes=1)

    monkeypatch.setattr(fitting, "fit", fit)
    for lowest in (1 << 30, 8 << 30):
        monkeypatch.setattr(processes, "lowest", lambda mine, other=lowest: min(mine, other))
        fitting.fitted(stage, trainer.model, trainer.assembled)
    assert limits == [1 << 30, 8 << 30]


def test_an_error_stays_what_it_is() -> None:
    with pytest.raises(InputError, match="broken") as caught, processes.together():
        raise InputError("broken")
    assert not isinstance(caught.value, processes.Elsewhere)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (
            "pytorch_model_fsdp.bin",
            "was saved under FSDP, and this process runs without them. The optimizer's state has a different",
        ),
        ("global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "resume under DeepSpeed."),
    ],
)
def test_state_of_another_engine_is_refused(tiny: Tiny, tmp_path: Path, file: str, said: str) -> None:
    """Transformers would begin with an empty one, and say nothing."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    trainer = make_trainer(tiny, tmp_path)
    with pytest.raises(InputError) as caught:
        trainer.check_start(tmp_path)
    assert said in refusal(caught.value)


def test_one_that_shares_out_refuses_what_was_not(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tiny, tmp_path)
    trainer.check_start(tiny.stage2 / "checkpoint-2")
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(InputError) as caught:
        trainer.check_start(tiny.stage2 / "checkpoint-2")
    assert "was saved without FSDP and DeepSpeed, and this" in refusal(caught.value)
    for number in range(2):
        (tmp_path / "global_step2").mkdir(exist_ok=True)
        (tmp_path / "global_step2" / f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(InputError) as caught:
        trainer.check_start(tmp_path)
    assert "was saved by 2 processes under DeepSpeed. Resume it with 2 processes" in refusal(caught.value)


def test_a_weightless_row_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """Loss and gradients of a batch with one more such pack, which a process computes while others have more."""
    trainer = make_trainer(tiny, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(2)])
    found = []
    for rows in (batch["packs"], [*batch["packs"], weightless_pack()]):
        trainer.model.zero_grad()
        trainer.model.train()
        loss = trainer.pack_step.compute(
            trainer.model, {**batch, "packs": [dict(row) for row in rows]}, torch.tensor(5)
        )
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        found.append((loss.detach(), gradients))
    (loss, gradients), (again, others) = found
    assert loss > 0 and torch.equal(loss, again) and len(gradients) == len(others)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


LEFT_OVER = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def left_over(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What a launcher has set in the shell, and nothing else."""
    for name in (*processes.LAUNCHED, *processes.SIZES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in LEFT_OVER.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_says_what_is_waited_for(left_over: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    alone = "unset RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT to train in one process."
    with processes.meeting():
        pass
    assert capsys.readouterr().err == (
        f"qllava: waiting for 2 processes at 127.0.0.1:1 (including this one), because WORLD_SIZE=2 is set; {alone}\n"
    )
    with pytest.raises(InputError) as caught, processes.meeting():
        raise torch.distributed.DistStoreError("Timed out after 1801 seconds waiting for clients. 1/2 clients joined.")
    said = str(caught.value)
    assert said.startswith("The 2 processes of this run did not connect at 127.0.0.1:1 (Timed out after 1801")
    assert said.endswith(alone)


def test_of_many_processes_one_speaks(left_over: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    left_over.setenv("RANK", "1")
    with processes.meeting():
        assert "waiting for 2" in capsys.readouterr().err
    left_over.setenv("TORCHELASTIC_RUN_ID", "none")
    with processes.meeting():
        assert capsys.readouterr().err == ""


def test_who_is_alone_waits_for_nobody(left_over: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    left_over.setenv("WORLD_SIZE", "1")
    with processes.meeting():
        assert capsys.readouterr().err == ""
    left_over.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE is 'two', but must be a number"), processes.meeting():
        pass
    left_over.delenv("WORLD_SIZE")
    left_over.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="LOCAL_RANK is set without WORLD_SIZE"), processes.meeting():
        pass


def test_settings_that_are_only_read_wait_for_nobody(left_over: pytest.MonkeyPatch) -> None:
    """`qllava plan` and `qllava check --config`, in a shell where a launcher's variables are left over."""
    settings = parse(["--model_name_or_path", "nano"], output_dir="unused", nano={}, elsewhere=True)
    assert settings.train.world_size == 1
    assert {name: os.environ.get(name) for name in LEFT_OVER} == LEFT_OVER


WAITING = """
from qllava.training.main import main
from qllava.training.settings import TrainConfig
raise SystemExit(main(lambda settings: None, lambda: TrainConfig(output_dir="run")))
"""


def test_a_run_that_waits_for_others_ends_by_a_signal(left_over: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch waits in C, where Python runs no handler."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        left_over.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    process = commands.start("-c", WAITING, cwd=tmp_path)
    while process.poll() is None and "qllava: " not in process.stderr():
        time.sleep(0.02)
    assert "waiting for 2 processes" in process.stderr()
    time.sleep(2)  # from the sentence into torch
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(timeout=2) == 143
    finally:
        process.kill()
    assert process.stderr().endswith("qllava: stopped by SIGTERM; run the same command to resume.\n")
