"""The number of threads on a CPU: by the size of the model, and never against the user."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from qllava.models import threads


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process to which torch gave four threads, and the user nothing."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_DEFAULT", 4)
    torch.set_num_threads(4)
    yield monkeypatch
    torch.set_num_threads(before)


def settled(hidden: int, device: str = "cpu") -> int:
    threads.settle_threads(SimpleNamespace(config=LlamaConfig(hidden_size=hidden), device=torch.device(device)))
    return torch.get_num_threads()


def test_a_small_model_answers_with_one_and_a_large_one_with_all(four: pytest.MonkeyPatch) -> None:
    assert settled(192) == 1
    assert settled(4096) == 4
    assert settled(192, device="cuda") == 4


def test_what_the_user_chose_is_kept(four: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    assert settled(192) == 2
    torch.set_num_threads(4)
    four.setenv("OMP_NUM_THREADS", "4")
    assert settled(192) == 4
