"""The peak memory of a training step before it is run, by part.

The figures come from the real training step on fake tensors (`memory.fake`). They differ from a GPU in these points:

- Autocast is torch's for the CPU, in the GPU's type. It differs from CUDA's in layer norms, which only the vision tower
  has, outside the graph.
- Attention is the kernel `groups`, which copies a prefix for each of its branches. Variable-length attention copies it
  as often, FlexAttention never, and compiled layers hold less: an upper bound.
- bitsandbytes' matrix product dequantizes the weight inside one operation, which cannot be traced: `workspace`.
- CUDA's own context, its libraries' workspace, and the allocator's fragmentation are allowances (`CONTEXT`, `NCCL`,
  `FRAGMENTS`). They were not measured: there was no GPU.
- 8-bit and paged optimizers run on real GPUs only and are counted by the size of their state. Of `paged` ones that is
  what remains on the GPU at the peak: their large tensors move to the host if memory is short. Optimizers whose state
  is not known (`fake.held_by`) count as AdamW.

The step is measured at its second pack: gradients and the optimizer's state exist. Memory is affine in the number of
equal layers, phase by phase, so a model of at most five layers predicts any number; with `whole=True` all layers are
run, and a test compares the two.
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
"""Bytes of a CUDA process before its first tensor: driver, loaded kernels, cuBLAS."""
NCCL = 512 << 20
"""Bytes per process with several processes: NCCL's kernels, and its buffers of 4 MB per channel and direction."""
FRAGMENTS = 0.05
"""Share of temporary memory that is lost to fragmentation in the allocator."""
PARTS = ("weights", "projector", "LoRA", "optimizer", "activations", "logits", "workspace")
OPTIMS = ("adamw_torch_fused", "paged_adamw_8bit")
"""Optimizers that `fit` chooses from: the second, which rounds its moments, only if the first does not fit."""
PACK_SIZES = (8192, 6144, 4096, 3072, 2048, 1024, 512)
"""Tokens per pack that `fit` chooses from."""

_RESIDENT, _BUCKETS = "resident", "buckets"
"""Measurements besides the phases of a step: the model alone, and DDP's copies of gradients."""


@dataclass(frozen=True)
class _Measured:
    """Memory of a step of a model with few layers."""

    phases: dict[str, Parts]
    """Parts by phase, without the optimizer's state."""
    adamw: int
    """Bytes of the state of torch's AdamW."""
    learning: list[torch.Size]
    """Shapes of the trained tensors, from which the state of any other optimizer follows."""

    def state(self, optim: str) -> int:
        """Return the bytes of an optimizer's state."""
        return self.adamw if optim == OPTIMS[0] else held_by(optim, self.learning)


@dataclass(frozen=True)
class Setup:
    """Everything that decides the memory of a step."""

    config: LlavaConfig
    """Shapes of the model."""
    lora: Lora | None
    """LoRA's settings; None for stage 1, which trains only the projector."""
    dtype: torch.dtype = torch.bfloat16
    """Type of the computation; trained tensors are fp32."""
    held: torch.dtype | None = None
    """Type of weights that are not quantized, and to which 4-bit ones are dequantized; None for `dtype`. On a CPU it is
    fp32, whatever the type of the computation."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device of the run; "cpu" leaves out what only a GPU needs."""
    load_in_4bit: bool = True
    """Whether the language model is quantized to 4 bit."""
    optim: str = OPTIMS[0]
    """Optimizer, by one of TRL's names."""
    tokens_per_pack: int = 2048
    """Tokens of the pack that is computed."""
    recompute_layers: int | None = None
    """Number of decoder layers, from the first, that are recomputed; None for all."""
    learned: float = 0.5
    """Share of a pack's tokens that is learned. Packs with images have less than half; text alone can have more."""
    samples_per_image: int = 2
    """Samples that share the tokens of an image (1.95 in LLaVA-Instruct)."""
    stop_tower: bool = True
    """Shortcut of `training.step.exact`."""
    prune_last_layer: bool = True
    """Shortcut of `training.step.exact`."""
    lora_first: bool = True
    """Shortcut of `training.step.exact`."""
    processes: int = 1
    """Number of processes of the run; several keep a second copy of the gradients, which they exchange."""

    @property
    def weights_in(self) -> torch.dtype:
        """Type of weights that are not quantized."""
        return self.held or self.dtype

    @property
    def layers(self) -> tuple[int, int]:
        """Numbers of decoder layers that keep their activations and that are recomputed; a pruned last one never is."""
        text: Any = self.config.text_config
        every = int(text.num_hidden_layers)
        most = every - int(self.prune_last_layer)
        again = most if self.recompute_layers is None else min(self.recompute_layers, most)
        return every - again, again


@dataclass(frozen=True)
class Estimate:
    """The peak of a step, and the memory held before and after it."""

    peak_bytes: int
    """Bytes of the peak."""
    parts: dict[str, int]
    """Bytes of the peak by the names of `PARTS`; gradients count under the part of their weights."""
    resident: dict[str, int]
    """Bytes of the model alone, without gradients: `weights`, `projector` and `LoRA`."""
    buckets: int = 0
    """Bytes that DDP holds in addition to the gradients."""


def recompute(language_model: Any, layers: int | None, *, preserve_rng_state: bool = True) -> None:
    """Let the first `layers` decoder layers (None: all) be recomputed in the backward pass during training.

    Such layers keep only their input. Loss and gradients stay the same; only dropout needs `preserve_rng_state`.
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    for index, layer in enumerate(language_model.layers):
        layer.gradient_checkpointing = layers is None or index < layers
        layer._gradient_checkpointing_func = again


def setup_of(train: TrainConfig, config: LlavaConfig, lora: Lora | None, *, load_in_4bit: bool) -> Setup:
    """Return the setup of a run on a GPU, or on a CPU if the user set `use_cpu`; `lora` is None in stage 1."""
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
    """Cache the measurements of a setup within the process: `fit` and `plan` need the same ones repeatedly.

    Args:
        measure: Called with a setup and numbers; must not depend on the setup's optimizer, pack length and
            recomputation except through the numbers.
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
    """Return the peak of a setup, of the phase that needs most; `whole` runs all layers instead of extrapolating."""
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
    """Add the contribution of one more layer, `times` times."""
    for name in base.keys() | further.keys():
        parts[name] += times * (further[name] - base[name])


@measured_once
def _measured(setup: Setup, kept: int, again: int, tokens: int) -> _Measured:
    """Measure a step with the given numbers of layers of each kind."""
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
    """Yield a model of that many layers prepared for training, a tracker that knows it, and a pack, of fake tensors."""
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
    """Return the size of DDP's copies of the gradients, which exist from the first step to the last."""
    found: Parts = Counter()
    for parameter in learning:
        found[tracker.part(parameter)] += parameter.nbytes
    return found


def prepare(model: Any, setup: Setup, again: int) -> None:
    """Prepare a model as a run does before its first step: packs, shortcuts, recomputation of the first layers."""
    llava = llava_of(model)
    exact.teach_packs(llava)
    exact.take_shortcuts(llava, setup)
    recompute(llava.model.language_model, again, preserve_rng_state=False)
