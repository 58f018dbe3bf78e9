"""Muon's steps are those of torch's own Muon; matrices become orthogonal in either type."""

from __future__ import annotations

import pytest
import torch

from qllava.nano import precision


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    monkeypatch.setattr(precision, "fast_dtype", lambda: request.param)
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_singular_values_come_near_to_one(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(precision.orthogonal(torch.randn(shape)))
    assert values.min() > 0.5 and values.max() < 1.4


def test_a_step_is_the_one_of_torchs_own(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start = torch.randn(8, 12)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    own = precision.Muon([mine], 1e-2)
    reference = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for seed in range(5):
        gradient = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        own.step()
        reference.step()
    # torch's own is computed in bf16.
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-6)
    assert (mine - start).abs().max() > 1e-2


def test_the_faster_type_is_one_of_two_and_the_context_is_its(dtype: torch.dtype) -> None:
    with precision.fast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dtype


def test_the_type_is_measured() -> None:
    assert precision.fast_dtype() in (torch.float32, torch.bfloat16)


def test_without_a_compiler_it_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    body = torch.nn.Linear(2, 2)
    monkeypatch.setenv("CXX", "no-such-compiler-anywhere -O2")
    assert precision.compiled(body) is body
    monkeypatch.setattr(precision.shutil, "which", lambda program: f"/bin/{program}")
    monkeypatch.setattr(torch, "compile", lambda module, **_: ("compiled", module))
    assert precision.compiled(body) == ("compiled", body)
    monkeypatch.delenv("CXX")
    assert precision.compiled(body) == ("compiled", body)
