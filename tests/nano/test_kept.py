"""A build that is stopped is resumed, and ends in the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qllava.config import NANO_WEIGHTS, InputError
from qllava.nano import kept, llama, tower

ROUNDS = tuple(replace(round_, steps=3, batch=2) for round_ in llama.ROUNDS * 2)
SCENES = tuple(replace(round_, steps=3, scenes=8) for round_ in tower.ROUNDS * 2)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler-anywhere")
    monkeypatch.setattr(kept, "EVERY_S", 0.0)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(NANO_WEIGHTS / "llama")


class Stop(Exception):
    """The power fails."""


def stopping(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """Let the state be written so many times, and stop then."""
    write = kept.Kept.write
    times = iter(range(after))

    def writes(self: kept.Kept, state: dict[str, object]) -> None:
        write(self, state)
        if next(times, None) is None:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(kept.Kept, "write", writes)
        yield


@pytest.mark.parametrize("after", [0, 2, 4])
def test_the_llama(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    state, said = tmp_path / "llama.state", list[str]()
    whole = llama.train(tokenizer, ROUNDS[:2])
    for _ in stopping(monkeypatch, after):
        with pytest.raises(Stop):
            llama.train(tokenizer, ROUNDS[:2], kept=state)
    resumed = llama.train(tokenizer, ROUNDS[:2], kept=state, log=said.append)
    assert said[0] == f"resuming round {after // 3 + 1} at step {after % 3 + 1}"
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("after", [1, 3])
def test_the_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    state = tmp_path / "tower.state"
    whole = tower.train(SCENES, batch=4)
    for _ in stopping(monkeypatch, after):
        with pytest.raises(Stop):
            tower.train(SCENES, batch=4, kept=state)
    resumed = tower.train(SCENES, batch=4, kept=state)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_state_of_another_build_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "tower.state"
    for _ in stopping(monkeypatch, 1):
        with pytest.raises(Stop):
            tower.train(SCENES, batch=4, kept=state)
    with pytest.raises(InputError, match="tower.state is of a build with another seed or other rounds"):
        tower.train(SCENES, batch=4, seed=1, kept=state)


def test_the_log_has_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = kept.log_to(tmp_path / "tower.log", "tower")
    log("step 100")
    log("step 200")
    lines = (tmp_path / "tower.log").read_text().splitlines()
    assert [line[20:] for line in lines] == ["step 100", "step 200"]
    assert capsys.readouterr().out == "tower: step 100\ntower: step 200\n"
