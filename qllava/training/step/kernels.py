"""Choice of the kernels that compute a pack: attention (`attention.py`), and the operations between products.

On a CUDA device each kernel is tried with the model's own widths, forward and backward. A kernel that is missing, or
disagrees with the plainest one, is left out, and the fastest of the others is chosen; on a CPU, and for attention in
fp32, it is the plainest. The measurements are in the ledger. Every checkpoint records the choice: a run resumed on the
same kind of device uses the same kernels, whatever a new measurement would say.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qllava.data.packing import Group
from qllava.training.settings import TrainConfig
from qllava.training.step.attention import Kernel, Sight, by_groups, flex, varlen
from qllava.training.step.exact import compiled, gated

TOLERANCE = 2e-2
"""Largest relative difference from `groups` in outputs and gradients: allows 16-bit rounding, not a wrong mask."""
# Two groups as in LLaVA-Instruct (600 shared tokens and questions about them), and a text.
TRIAL = (Group(0, 600, (200, 120, 80)), Group(1000, 600, (150, 50)), Group(1800, 0, (248,)))
KERNELS: dict[Kernel, Callable[..., Tensor]] = {"groups": by_groups, "varlen": varlen, "flex": flex}


TRIAL_TOKENS = 2048
"""Tokens of the pack with which compiled kernels are tried."""
Layers = Literal["plain", "compiled"]
Trial = Callable[[list[Tensor]], list[Tensor]]
Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Chosen(Generic[Name]):
    """A kernel and why it was chosen."""

    kernel: Name
    """Name of the kernel."""
    why: str
    """Reason, in one line."""


@dataclass(frozen=True)
class Settled:
    """The kernels that compute the packs of a run."""

    on: str
    """Device and type for which they were chosen."""
    attention: Chosen[Kernel]
    """Kernel of attention by packs."""
    layers: Chosen[Layers]
    """Whether norms and gates are compiled."""

    def record(self) -> dict[str, Any]:
        """Return what every checkpoint records, for `settle` on resume."""
        return {"on": self.on, "attention": self.attention.kernel, "layers": self.layers.kernel}

    def line(self) -> str:
        """Return the choices with their reasons, for the ledger."""
        attention, layers = self.attention, self.layers
        return (
            f"attention by packs: {attention.kernel} ({attention.why}); norms and gates: {layers.kernel} ({layers.why})"
        )


def settle(llava: Any, config: TrainConfig, kept: Mapping[str, Any]) -> Settled:
    """Choose the kernels by trial, or take those of a checkpoint written on the same kind of device.

    Args:
        llava: A LlavaForConditionalGeneration.
        config: The loop's settings.
            kept: `record` of the checkpoint that is resumed; empty for a new run.
    """
    device, dtype = llava.device, computing_in(config, llava.dtype)
    on = f"{device.type} in {str(dtype).removeprefix('torch.')}"
    kept = kept if kept.get("on") == on else {}
    kind = (llava.config.text_config, device, dtype)
    attention = choose(*kind, kept.get("attention"))
    return Settled(on, attention, choose_layers(*kind, config.compile_layers, kept.get("layers")))


def computing_in(config: TrainConfig, dtype: torch.dtype) -> torch.dtype:
    """Return the type the model computes in: autocast's, or its own."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else dtype


def choose(config: Any, device: torch.device, dtype: torch.dtype, kept: Kernel | None = None) -> Chosen[Kernel]:
    """Choose the attention kernel for a language model's heads.

    Args:
        config: A LlamaConfig or MistralConfig.
        device: Device of the model.
        dtype: Type the model computes in.
        kept: Kernel of the checkpoint that is resumed; taken if it works on this device.
    """
    if device.type != "cuda":
        return Chosen("groups", "the only kernel without CUDA")
    if dtype == torch.float32:
        return Chosen("groups", "the only kernel for fp32")
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    generator = torch.Generator(device).manual_seed(0)
    pack = [
        torch.randn(1, n, TRIAL[-1].end, width, dtype=dtype, device=device, generator=generator)
        for n in (heads, shared, shared)
    ]
    return fastest(pack, {name: partial_trial(name) for name in KERNELS}, kept)


def choose_layers(
    config: Any, device: torch.device, dtype: torch.dtype, asked: bool | None, kept: Layers | None = None
) -> Chosen[Layers]:
    """Choose whether norms and gates of the decoder layers are compiled.

    Args:
        config: A LlamaConfig or MistralConfig.
        device: Device of the model.
        dtype: Type the model computes in.
        asked: The user's setting; None for the faster one on CUDA and plain elsewhere.
        kept: Choice of the checkpoint that is resumed.
    """
    if asked is not None:
        return Chosen("compiled" if asked else "plain", "set by compile_layers")
    if device.type != "cuda":
        return Chosen("plain", "the default without CUDA")
    generator = torch.Generator(device).manual_seed(0)
    pack = [
        torch.randn(1, TRIAL_TOKENS, width, dtype=dtype, device=device, generator=generator)
        for width in (config.hidden_size, config.intermediate_size, config.intermediate_size)
    ]
    norm = LlamaRMSNorm(config.hidden_size).to(device, dtype).requires_grad_(False)
    return fastest(
        pack, {"plain": layer_trial(norm, lambda function: function), "compiled": layer_trial(norm, compiled)}, kept
    )


def layer_trial(norm: LlamaRMSNorm, how: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Trial:
    """Return a forward and backward pass of a norm and a gate, which gives outputs and gradients."""

    def run(pack: list[Tensor]) -> list[Tensor]:
        given = [x.detach().requires_grad_() for x in pack]
        out = [how(type(norm).forward)(norm, given[0]), how(gated)(silu, given[1], given[2])]
        total = torch.stack([x.float().square().sum() for x in out]).sum()
        return [*(x.detach() for x in out), *torch.autograd.grad(total, given)]

    return run


def partial_trial(kernel: Kernel) -> Trial:
    """Return a forward and backward pass of a kernel over the trial's pack: output and the three gradients."""

    def run(pack: list[Tensor]) -> list[Tensor]:
        learned = torch.arange(0, device=pack[0].device)
        sight = Sight(TRIAL, learned, [0] * sum(len(group.branches) for group in TRIAL), kernel)
        given = [x.detach().requires_grad_() for x in pack]
        out = KERNELS[kernel](*given, sight)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), given)]

    return run


def fastest(pack: list[Tensor], trials: dict[Name, Trial], kept: Name | None = None) -> Chosen[Name]:
    """Return the fastest trial that agrees with the first, or `kept` without timing if it agrees."""
    first, *_ = trials
    wanted = trials[first](pack)
    seconds: dict[Name, float] = {}
    said = []
    if kept in trials:
        fault = _fault(trials[kept], pack, wanted)
        if fault is None:
            return Chosen(kept, "as in the checkpoint")
        said.append(f"{kept}, which the checkpoint had, {fault}")
    for name, trial in trials.items():
        if fault := _fault(trial, pack, wanted):
            said.append(f"{name} {fault}")
            continue
        seconds[name] = _median_seconds(trial, pack)
        said.append(f"{name} {seconds[name] * 1000:.2f} ms")
    return Chosen(min(seconds, key=lambda name: seconds[name]), ", ".join(said))


def _fault(trial: Trial, pack: list[Tensor], wanted: list[Tensor]) -> str | None:
    """Return why a trial cannot be used on this device; None if it can."""
    try:
        found = trial(pack)
    except Exception as error:  # whatever this device lacks, the other kernels remain
        return f"is not available ({type(error).__name__})"
    off = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)]
    # Not `max` alone: it passes over a NaN that is not first.
    if all(difference <= TOLERANCE for difference in off):
        return None
    return f"differs by {max(off):.1%}" if all(map(math.isfinite, off)) else "computes values that are not finite"


def _median_seconds(trial: Trial, pack: list[Tensor], repetitions: int = 7) -> float:
    taken = []
    for _ in range(repetitions):
        began = time.perf_counter()
        trial(pack)
        if pack[0].is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[repetitions // 2]
