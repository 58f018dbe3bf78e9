"""One process does what it is asked, and its errors are its own; several are in tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qllava.config import InputError
from qllava.data.collate import weightless_row
from qllava.training import processes
from tests.tiny_runs import Tiny, make_trainer, refusal


def test_alone() -> None:
    assert not processes.several() and processes.is_main() and processes.share() == (0, 1)
    assert processes.highest(7) == 7 and processes.every([1, 2]) == [1, 2]
    assert processes.by_main(lambda: "made") == "made"
    made: list[int] = []
    assert processes.main_first(lambda: made.append(1)) is None and made == [1]


def test_an_error_stays_what_it_is() -> None:
    with pytest.raises(InputError, match="broken") as caught, processes.together():
        raise InputError("broken")
    assert not isinstance(caught.value, processes.Elsewhere)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("pytorch_model_fsdp.bin", "was saved under FSDP, where the optimizer's state has another form than here"),
        ("global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "was saved under DeepSpeed, where"),
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
    assert "was saved without FSDP and DeepSpeed, where" in refusal(caught.value)
    for number in range(2):
        (tmp_path / "global_step2").mkdir(exist_ok=True)
        (tmp_path / "global_step2" / f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(InputError) as caught:
        trainer.check_start(tmp_path)
    assert "was saved by 2 processes under DeepSpeed, which continues with as many only" in refusal(caught.value)


def test_a_weightless_row_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """Loss and gradients of a batch with one more such row, which a process computes while others have more."""
    trainer = make_trainer(tiny, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(2)])
    found = []
    for rows in (batch["rows"], [*batch["rows"], weightless_row()]):
        trainer.model.zero_grad()
        trainer.model.train()
        loss = trainer._rows(trainer.model, {**batch, "rows": [dict(row) for row in rows]}, torch.tensor(5))
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        found.append((loss.detach(), gradients))
    (loss, gradients), (again, others) = found
    assert loss > 0 and torch.equal(loss, again) and len(gradients) == len(others)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
