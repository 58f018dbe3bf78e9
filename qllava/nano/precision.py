"""How nano's parts are trained on a CPU: compiled, in bf16 where it is faster, else in fp32; and Muon for both.

A CPU with matrix units for bf16 (AMX) multiplies in it several times as fast as in fp32, one without is several times
slower.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration that Muon was published with (Jordan and others, 2024)."""


@cache
def fast_dtype() -> torch.dtype:
    """Return bf16 if this CPU multiplies matrices clearly faster in it, else fp32; measured, in a few milliseconds.

    With matrix units the factor is several, without it is below 1: at 1.5 other work on the machine changes nothing.
    """
    fastest = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        taken = []
        for _ in range(6):
            started = time.perf_counter()
            a @ a
            taken.append(time.perf_counter() - started)
        fastest[dtype] = min(taken)
    return torch.bfloat16 if 1.5 * fastest[torch.bfloat16] < fastest[torch.float32] else torch.float32


def fast() -> AbstractContextManager[Any]:
    """Return a context in which matrix products are computed in `fast_dtype`."""
    return torch.autocast("cpu", torch.bfloat16) if fast_dtype() == torch.bfloat16 else nullcontext()


def compiled(module: torch.nn.Module) -> Callable[..., Any]:
    """Return the module as `torch.compile` makes it; as it is where torch finds no C++ compiler.

    torch calls $CXX, else the one that its platform usually has. It would look for it at the first step only and fail.
    """
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    program, *_ = shlex.split(os.environ.get("CXX") or usual)
    if shutil.which(program) is None:
        return module
    faster: Callable[..., Any] = torch.compile(module, dynamic=False)
    return faster


class Muon(torch.optim.Optimizer):
    """Muon for matrices, with AdamW's step size: the momentum, with its singular values brought to about 1.

    torch.optim.Muon does the same in bf16 only, which takes four times as long on a CPU without units for it.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, *, weight_decay: float = 0.05, momentum: float = 0.95
    ) -> None:
        """Take the matrices to train, the learning rate, decoupled weight decay and Nesterov's momentum."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do one step; a closure is not taken."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # The root mean square of AdamW's steps is about 0.2.
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return a matrix (M, N) with its singular values brought to between about 0.7 and 1.2, in `fast_dtype`."""
    a, b, c = _NEWTON_SCHULZ
    x = matrix.to(fast_dtype())
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)
