"""The peak memory of a training step before it is run, by part.

The figures come from the real training step on fake tensors (`memory.fake`). What of a card that leaves out:

- Autocast is torch's for the CPU, in the card's type. It differs from CUDA's in layer norms, which only the tower has,
  outside the graph.
- Attention is that by groups, which copies a prefix for each of its branches. Variable-length attention copies it as
  often, FlexAttention never, and compiled layers hold less than these: an upper bound.
- bitsandbytes' matrix product makes the weight whole inside one operation, where nothing is seen: `workspace`.
- CUDA's own context, its libraries' workspace, and what the allocator loses between its blocks are allowances
  (`CONTEXT`, `NCCL`, `FRAGMENTS`). They were not measured: there was no GPU.
- 8-bit and paged optimizers run on real cards only and are counted by what they hold. Of `paged` ones that is what lies
  on the card at the peak: their large tensors go to the host when memory is short. Optimizers whose state is not known
  (`fake.held_by`) count as AdamW.

A step is looked at as a second pack of it sees it: gradients and the optimizer's state are there. Memory is affine in
the number of equal layers, phase by phase, so a model of five layers or fewer tells that of any number; with
`whole=True` all layers are run, and a test holds one against the other.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Literal, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import LlavaConfig

from qllava.models.lora import Lora
from qllava.training.memory.fake import (
    Parts,
    Tracker,
    example_pack,
    fake_llava,
    held_by,
    llava_of,
    step_of_pack,
    tensors_of,
    track_model,
)
from qllava.training.settings import TrainConfig
from qllava.training.step import exact

T = TypeVar("T")
CONTEXT = 512 << 20
"""Of a CUDA process before its first tensor: driver, loaded kernels, cuBLAS."""
NCCL = 512 << 20
"""Of each of several processes: NCCL's kernels, and its buffers of 4 MB a channel and direction."""
FRAGMENTS = 0.05
"""Of what comes and goes, lost between the allocator's blocks."""
PARTS = ("weights", "projector", "LoRA", "optimizer", "activations", "logits", "workspace")
OPTIMS = ("adamw_torch_fused", "paged_adamw_8bit")
"""What `fit` chooses from: the second, which rounds its moments, only where the first does not fit."""
PACK_SIZES = (8192, 6144, 4096, 3072, 2048, 1024, 512)
"""What `fit` chooses from."""

_RESIDENT, _BUCKETS = "resident", "buckets"
"""What is measured besides the phases of a step: the model alone, and DDP's copies of gradients."""


@dataclass(frozen=True)
class _Measured:
    """What a step of a model of few layers holds."""

    phases: dict[str, Parts]
    """Parts by phase, without the optimizer's state."""
    adamw: int
    """Bytes of the state of torch's AdamW."""
    learning: list[torch.Size]
    """Shapes of what learns, from which the state of any other optimizer follows."""

    def state(self, optim: str) -> int:
        """Return the bytes of an optimizer's state."""
        return self.adamw if optim == OPTIMS[0] else held_by(optim, self.learning)


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a step.

    config: the model's shapes.
    lora: None for stage 1, in which the projector learns alone.
    dtype: of the computation; what learns is fp32.
    held: of weights that are not quantized, and what 4-bit ones are unpacked to; None for `dtype`. On a CPU it is fp32,
        whatever is computed in.
    device: "cpu" leaves out what only a card takes.
    processes: of the run. More than one keep a second copy of the gradients, which they send to each other.
    optim: one of TRL's names.
    tokens_per_pack: of the pack that goes through the model.
    recompute_layers: how many decoder layers, the first ones, are recomputed; None for all.
    learned: share of a pack that is learned. Packs about images have less than half; text alone can have more.
    samples_per_image: that share its tokens (LLaVA-Instruct has 1.95).
    stop_tower, prune_last_layer, lora_first: the shortcuts of `training.exact`.
    """

    config: LlavaConfig
    lora: Lora | None
    dtype: torch.dtype = torch.bfloat16
    held: torch.dtype | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    load_in_4bit: bool = True
    optim: str = OPTIMS[0]
    tokens_per_pack: int = 2048
    recompute_layers: int | None = None
    learned: float = 0.5
    samples_per_image: int = 2
    stop_tower: bool = True
    prune_last_layer: bool = True
    lora_first: bool = True
    processes: int = 1

    @property
    def weights_in(self) -> torch.dtype:
        """Type of weights that are not quantized."""
        return self.held or self.dtype

    @property
    def layers(self) -> tuple[int, int]:
        """Decoder layers that keep what they compute, and those that are recomputed; a pruned last one never is."""
        text: Any = self.config.text_config
        every = int(text.num_hidden_layers)
        most = every - int(self.prune_last_layer)
        again = most if self.recompute_layers is None else min(self.recompute_layers, most)
        return every - again, again


@dataclass(frozen=True)
class Estimate:
    """The peak of a step, and what is held before and after it."""

    peak_bytes: int
    parts: dict[str, int]
    """What the peak consists of, by the names of `PARTS`; gradients count to their weights."""
    resident: dict[str, int]
    """Bytes of the model alone, without gradients: `weights`, `projector` and `LoRA`."""
    buckets: int = 0
    """What DDP holds beside the gradients."""


def recompute(language_model: Any, layers: int | None, *, preserve_rng_state: bool = True) -> None:
    """Let the first `layers` decoder layers (None: all) be recomputed on the way back, while they train.

    They hold their input alone. Loss and gradients stay the same; `preserve_rng_state` is needed for dropout only.
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    for index, layer in enumerate(language_model.layers):
        layer.gradient_checkpointing = layers is None or index < layers
        layer._gradient_checkpointing_func = again


def setup_of(train: TrainConfig, config: LlavaConfig, lora: Lora | None, *, load_in_4bit: bool) -> Setup:
    """What the settings of a run come to on a card, or where the user set `use_cpu` on a CPU; no LoRA in stage 1."""
    on_cpu = train.asks_cpu
    cpu_dtype = torch.bfloat16 if train.bf16 else torch.float32
    every = None if train.gradient_checkpointing else 0
    return Setup(
        config,
        lora,
        dtype=cpu_dtype if on_cpu else torch.float16 if train.fp16 else torch.bfloat16,
        held=torch.float32 if on_cpu else None,
        device="cpu" if on_cpu else "cuda",
        load_in_4bit=load_in_4bit,
        optim=train.optimizer,
        tokens_per_pack=train.tokens_per_pack or train.max_length or PACK_SIZES[0],
        recompute_layers=every if train.recompute_layers is None else train.recompute_layers,
        samples_per_image=2 if train.share_image_prefix else 1,
        stop_tower=train.stop_tower,
        prune_last_layer=train.prune_last_layer,
        lora_first=train.lora_first,
        processes=train.world_size,
    )


def measured_once(measure: Callable[..., T]) -> Callable[..., T]:
    """Let a measurement of a setup be made once in a process: `fit` and `plan` ask for the same again and again.

    measure: of a setup and numbers, whatever the setup's optimizer, pack length and recomputation, which it is given
        as numbers.
    """
    kept: dict[Any, T] = {}

    @wraps(measure)
    def known(setup: Setup, *numbers: int) -> T:
        rest = replace(setup, config=None, optim="", tokens_per_pack=0, recompute_layers=None)  # type: ignore[arg-type]
        key = (setup.config.to_json_string(use_diff=False), rest, *numbers)
        if key not in kept:
            kept[key] = measure(setup, *numbers)
        return kept[key]

    return known


def estimate(setup: Setup, *, whole: bool = False) -> Estimate:
    """The peak of a setup: the phase in which the most lives. whole: run all layers instead of extrapolating."""
    kept, again = setup.layers
    tokens = setup.tokens_per_pack
    start = (kept, again) if whole else (min(kept, 2), min(again, 2))
    base = _measured(setup, *start, tokens)
    phases, optimizer = {name: Counter(parts) for name, parts in base.phases.items()}, base.state(setup.optim)
    for missing, further in (
        (kept - start[0], (start[0] + 1, start[1])),
        (again - start[1], (start[0], start[1] + 1)),
    ):
        if not missing:
            continue
        one_more = _measured(setup, *further, tokens)
        for name, parts in phases.items():
            _extend(parts, base.phases[name], one_more.phases[name], missing)
        optimizer += missing * (one_more.state(setup.optim) - base.state(setup.optim))
    resident, buckets = phases.pop(_RESIDENT), phases.pop(_BUCKETS)
    parts = max(phases.values(), key=lambda found: found.total()) + buckets
    if setup.device == "cuda":
        parts["workspace"] += (
            CONTEXT
            + (NCCL if setup.processes > 1 else 0)
            + int(FRAGMENTS * sum(parts[p] for p in ("activations", "logits", "workspace")))
        )
    parts["optimizer"] = optimizer
    named = {name: int(parts[name]) for name in PARTS}
    return Estimate(sum(named.values()), named, {name: int(size) for name, size in resident.items()}, buckets.total())


def _extend(parts: Parts, base: Parts, further: Parts, times: int) -> None:
    """Add what one more layer adds, so many times."""
    for name in base.keys() | further.keys():
        parts[name] += times * (further[name] - base[name])


@measured_once
def _measured(setup: Setup, kept: int, again: int, tokens: int) -> _Measured:
    """Measure a step of so many layers of each kind."""
    with measuring(setup, kept, again, tokens) as (model, tracker, pack):
        step_of_pack(model, tracker, pack, setup.dtype)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = 0
    for parts in tracker.peaks.values():
        adamw = parts.pop("optimizer")
    for parameter in learning:
        parameter.grad = None
    tracker.peaks[_RESIDENT] = Counter({part: tracker.live[part] for part in ("weights", "projector", "LoRA")})
    tracker.peaks[_BUCKETS] = _buckets(tracker, learning) if setup.processes > 1 else Counter()
    return _Measured(tracker.peaks, adamw, [parameter.shape for parameter in learning])


@contextmanager
def measuring(setup: Setup, kept: int, again: int, tokens: int) -> Iterator[tuple[Any, Tracker, dict[str, Any]]]:
    """Give a model of so many layers, as it is trained, a tracker that knows it, and a pack, all of fake tensors."""
    config: Any = copy.deepcopy(setup.config)
    config.text_config.num_hidden_layers = kept + again
    pack = tensors_of(
        config, example_pack(config, tokens, learned=setup.learned, samples_per_image=setup.samples_per_image)
    )
    with FakeTensorMode():
        model = fake_llava(
            config,
            load_in_4bit=setup.load_in_4bit,
            dtype=setup.weights_in,
            lora=setup.lora,
        ).train()
        prepare(model, setup, again)
        tracker = Tracker(config.text_config.vocab_size)
        fake_pack = {
            name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
            for name, value in pack.items()
        }
        with tracker:
            track_model(tracker, model)
            for tensor in (value for value in fake_pack.values() if isinstance(value, torch.Tensor)):
                tracker.put(tensor, "activations")
            yield model, tracker, fake_pack


def _buckets(tracker: Tracker, learning: list[Any]) -> Parts:
    """Count the copies of gradients that DDP sends, which live from the first step to the last."""
    found: Parts = Counter()
    for parameter in learning:
        found[tracker.part(parameter)] += parameter.nbytes
    return found


def prepare(model: Any, setup: Setup, again: int) -> None:
    """What a run does to a model before its first step: packs, shortcuts, recomputation of the first layers."""
    llava = llava_of(model)
    exact.teach_packs(llava)
    exact.take_shortcuts(llava, setup)
    recompute(llava.model.language_model, again, preserve_rng_state=False)
