"""Which kernel computes attention by rows on this device (`training/attention.py` has them).

On a CUDA device each computes a row of the model's own heads, forward and backward. One that is not there, or does not
agree with `groups`, is left out, and the fastest of the others is taken; in fp32 and on a CPU it is `groups`. What
was measured stands in the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qllava.data.packing import Group
from qllava.training.attention import Kernel, Sight, by_groups, flex, varlen

TOLERANCE = 2e-2
"""Largest difference from `groups` in outputs and gradients, against the largest value: 16-bit rounding, not a mask."""
# Two groups as LLaVA-Instruct has them: 600 shared tokens, and questions about them; and a text.
TRIAL = (Group(0, 600, (200, 120, 80)), Group(1000, 600, (150, 50)), Group(1800, 0, (248,)))
KERNELS: dict[Kernel, Callable[..., Tensor]] = {"groups": by_groups, "varlen": varlen, "flex": flex}


@dataclass(frozen=True)
class Chosen:
    """A kernel, and why it was chosen, in a line."""

    kernel: Kernel
    why: str


def choose(config: Any, device: torch.device, dtype: torch.dtype) -> Chosen:
    """The kernel for a language model's heads.

    config: a LlamaConfig or MistralConfig.
    dtype: what the model computes in.
    """
    if device.type != "cuda":
        return Chosen("groups", "group by group, as everywhere but on CUDA")
    if dtype == torch.float32:
        return Chosen("groups", "group by group, because the model computes in fp32")
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    generator = torch.Generator(device).manual_seed(0)
    row = [
        torch.randn(1, n, TRIAL[-1].end, width, dtype=dtype, device=device, generator=generator)
        for n in (heads, shared, shared)
    ]
    return fastest(row, {name: partial_trial(name) for name in KERNELS})


def partial_trial(kernel: Kernel) -> Callable[[list[Tensor]], list[Tensor]]:
    """Forward and backward pass of a kernel over the trial's row: output and the three gradients."""

    def run(row: list[Tensor]) -> list[Tensor]:
        learned = torch.arange(0, device=row[0].device)
        sight = Sight(TRIAL, learned, [0] * sum(len(group.branches) for group in TRIAL), kernel)
        given = [x.detach().requires_grad_() for x in row]
        out = KERNELS[kernel](*given, sight)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), given)]

    return run


def fastest(row: list[Tensor], trials: dict[Kernel, Callable[[list[Tensor]], list[Tensor]]]) -> Chosen:
    """The fastest of the trials that agree with `groups`."""
    wanted = trials["groups"](row)
    seconds: dict[Kernel, float] = {}
    said = []
    for name, trial in trials.items():
        try:
            found = trial(row)
        except Exception as error:  # whatever is missing on this device, the others remain
            said.append(f"{name} is not available ({type(error).__name__})")
            continue
        off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
        if not off <= TOLERANCE:
            said.append(f"{name} differs by {off:.1%}")
            continue
        seconds[name] = _median_seconds(trial, row)
        said.append(f"{name} {seconds[name] * 1000:.2f} ms")
    return Chosen(min(seconds, key=lambda name: seconds[name]), ", ".join(said))


def _median_seconds(trial: Callable[[list[Tensor]], list[Tensor]], row: list[Tensor], repetitions: int = 7) -> float:
    taken = []
    for _ in range(repetitions):
        began = time.perf_counter()
        trial(row)
        if row[0].is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[repetitions // 2]
