"""Will it fit: the peak memory of a training run before it starts, by part, and the settings that make it fit.

The figures come from the real training step on fake tensors (`training.fake`). What of a card that leaves out:

- Autocast is torch's for the CPU, in the card's type. It differs from CUDA's in layer norms, which only the tower has,
  outside the graph.
- Attention is that by groups, which copies a prefix for each of its branches. Variable-length attention copies it as
  often, FlexAttention never, and compiled layers hold less than these: an upper bound.
- bitsandbytes' matrix product makes the weight whole inside one operation, where nothing is seen: `workspace`.
- CUDA's own context, its libraries' workspace, and what the allocator loses between its blocks are allowances
  (`CONTEXT`, `FRAGMENTS`). They were not measured: there was no GPU.
- 8-bit and paged optimizers run on real cards only and are counted by what they hold. Of `paged` ones that is what lies
  on the card at the peak: their large tensors go to the host when memory is short. Optimizers that are not AdamW count
  as AdamW.

A step is looked at as a second row of it sees it: gradients and the optimizer's state are there. Memory is affine in
the number of equal layers, phase by phase, so a model of five layers or fewer tells that of any number; with
`whole=True` all layers are run, and a test holds one against the other.

GB are 2**30 bytes here, as cards are sold.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import LlavaConfig

from qllava.config import InputError, ModelConfig
from qllava.models.checkpoint import tokens_per_image
from qllava.training import exact
from qllava.training.fake import (
    Parts,
    Tracker,
    example_row,
    fake_llava,
    held_by,
    llava_of,
    step_of_rows,
    tensors_of,
    track_model,
)
from qllava.training.settings import TrainConfig

GB = 1 << 30
CONTEXT = 512 << 20
"""Of a CUDA process before its first tensor: driver, loaded kernels, cuBLAS."""
FRAGMENTS = 0.05
"""Of what comes and goes, lost between the allocator's blocks."""
CARDS = (4, 6, 8, 12, 16, 24, 32, 48, 80)
"""GB that cards are sold with."""
PARTS = ("weights", "projector", "LoRA", "optimizer", "activations", "logits", "workspace")
OPTIMS = ("adamw_torch_fused", "paged_adamw_8bit")
"""What `fit` chooses from: the second, which rounds its moments, only where the first does not fit."""
ROWS = (8192, 6144, 4096, 3072, 2048, 1024, 512)
"""What `fit` chooses from."""
_PER_PASS = 300
"""Tokens whose products take as long as making all weights whole: 4.5 bytes of traffic a weight, 2 FLOP a token."""

Known = dict[tuple[int, int, int], tuple[dict[str, Parts], Parts]]


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a step.

    config: the model's shapes.
    lora_r: 0 for stage 1, in which the projector learns alone.
    dtype: of weights that are not quantized, and of the computation; what learns is fp32.
    device: "cpu" leaves out what only a card takes.
    optim: one of TRL's names.
    tokens_per_row: of the row that goes through the model.
    recompute_layers: how many decoder layers, the first ones, are recomputed; None for all.
    learned: share of a row that is learned. Rows about pictures have less than half; text alone can have more.
    samples_per_picture: that share its tokens (LLaVA-Instruct has 1.95).
    stop_tower, prune_last_layer, lora_first: the shortcuts of `training.exact`.
    """

    config: LlavaConfig
    lora_r: int
    dtype: torch.dtype = torch.bfloat16
    device: Literal["cuda", "cpu"] = "cuda"
    load_in_4bit: bool = True
    lora_dropout: float = 0.0
    optim: str = OPTIMS[0]
    tokens_per_row: int = 2048
    recompute_layers: int | None = None
    learned: float = 0.5
    samples_per_picture: int = 2
    stop_tower: bool = True
    prune_last_layer: bool = True
    lora_first: bool = True

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
    """The peak, in bytes, and what it consists of (`PARTS`); gradients count to their weights."""

    peak_bytes: int
    parts: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """What was chosen, and what it comes to.

    fits: under the limit; None where there is none.
    suggestion: one sentence.
    """

    tokens_per_row: int
    recompute_layers: int
    optim: str
    estimate: Estimate
    fits: bool | None
    suggestion: str


class DoesNotFit(InputError):
    """Nothing that may be chosen stays under the limit; `plan` is what comes nearest."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.suggestion)
        self.plan = plan


def parse_bytes(text: str) -> int:
    """`12GB`, `7.5 GiB` or `900MB` in bytes, binary units all of them. Raises InputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])(?:i?B)?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise InputError(f"The amount of memory {text!r} cannot be read; write it as 12GB or 900MB.")
    return int(float(found[1]) * (GB if found[2].upper() == "G" else 1 << 20))


def format_bytes(size: float) -> str:
    """`7.4 GB`; below one GB `12.3 MB`."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / (1 << 20):.1f} MB"


def recompute(language_model: Any, layers: int | None, *, preserve_rng_state: bool = True) -> None:
    """Let the first `layers` decoder layers (None: all) be recomputed on the way back, while they train.

    They hold their input alone. Loss and gradients stay the same; `preserve_rng_state` is needed for dropout only.
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    for index, layer in enumerate(language_model.layers):
        layer.gradient_checkpointing = layers is None or index < layers
        layer._gradient_checkpointing_func = again


def setup_of(model: ModelConfig, train: TrainConfig, config: LlavaConfig, *, lora_r: int) -> Setup:
    """What the settings of a run come to on a card, or with `use_cpu` on a CPU; lora_r 0 for stage 1."""
    on_cpu = bool(train.use_cpu)
    every = None if train.gradient_checkpointing else 0
    return Setup(
        config,
        lora_r,
        dtype=torch.float32 if on_cpu else torch.float16 if train.fp16 else torch.bfloat16,
        device="cpu" if on_cpu else "cuda",
        load_in_4bit=model.load_in_4bit,
        lora_dropout=model.lora_dropout,
        optim=train.optimizer,
        tokens_per_row=train.tokens_per_row or train.max_length or ROWS[0],
        recompute_layers=every if train.recompute_layers is None else train.recompute_layers,
        samples_per_picture=2 if train.share_image_prefix else 1,
        stop_tower=train.stop_tower,
        prune_last_layer=train.prune_last_layer,
        lora_first=train.lora_first,
    )


def settled(train: TrainConfig) -> set[str]:
    """Which of `fit`'s choices the settings leave it none of: what the user sets explicitly wins."""
    chosen = {
        "tokens_per_row": train.tokens_per_row is not None,
        "recompute_layers": train.recompute_layers is not None or not train.gradient_checkpointing,
        "optim": train.optimizer != OPTIMS[0],
    }
    return {name for name, is_set in chosen.items() if is_set}


def estimate(setup: Setup, *, whole: bool = False) -> Estimate:
    """The peak of a setup. whole: run all layers instead of extrapolating from a few."""
    return _estimate(setup, {}, whole=whole)


def fit(
    setup: Setup, limit: int, *, least_tokens: int = 0, most_tokens: int | None = None, fixed: Collection[str] = ()
) -> Plan:
    """The fastest row size, recomputation and optimizer that stay under a limit.

    The time of a token goes as (2 + share of the layers that are recomputed) x (1 + 300 / tokens of a row): two passes
    or three, each of which makes the 4-bit weights whole once a row. The optimizer is changed only when nothing fits.

    limit: in bytes, CUDA's own context included.
    least_tokens: of a row; the longest sample, which is not cut. most_tokens: a larger row would never be filled.
    fixed: which of tokens_per_row, recompute_layers and optim are taken from the setup as they are.
    Raises DoesNotFit, an InputError, which says by how much, and what would fit.
    """
    rows = _rows(setup, least_tokens, most_tokens, fixed)
    known: Known = {}
    for optim in (setup.optim,) if "optim" in fixed else OPTIMS:
        found: list[tuple[float, Setup]] = []
        for tokens in tqdm(rows, desc="looking for what fits", leave=False, disable=None):
            # Smaller rows recompute nothing at best.
            if found and found[0][0] <= 2 * (1 + _PER_PASS / tokens):
                break
            trial = replace(setup, optim=optim, tokens_per_row=tokens)
            fewest = _fewest(trial, limit, known, fixed="recompute_layers" in fixed)
            if fewest is not None:
                kept, again = fewest.layers
                found.append(((2 + again / (kept + again)) * (1 + _PER_PASS / tokens), fewest))
                found.sort(key=lambda one: one[0])
        if found:
            best = found[0][1]
            return plan_of(best, _estimate(best, known), limit)
    smallest = replace(trial, tokens_per_row=rows[-1])
    if "recompute_layers" not in fixed:
        smallest = replace(smallest, recompute_layers=None)
    raise DoesNotFit(_refusal(smallest, _estimate(smallest, known), limit, fixed))


def plan_of(setup: Setup, found: Estimate, limit: int | None = None) -> Plan:
    """A setup with its estimate, held against a limit."""
    fits = None if limit is None else found.peak_bytes <= limit
    card = next((size for size in CARDS if found.peak_bytes <= size * GB), None)
    kept, again = setup.layers
    suggestion = (
        f"Set tokens_per_row {setup.tokens_per_row}, recompute_layers {again} (of {kept + again}) and optim "
        f"{setup.optim}, which fit_memory chooses by itself."
        if fits
        else f"A card of {card} GB is enough."
        if card
        else "No single card that is sold is enough; take a smaller language model."
    )
    return Plan(setup.tokens_per_row, again, setup.optim, found, fits, suggestion)


def _rows(setup: Setup, least: int, most: int | None, fixed: Collection[str]) -> list[int]:
    """Row sizes to look at, the largest first."""
    if "tokens_per_row" in fixed:
        return [setup.tokens_per_row]
    least = max(least, tokens_per_image(setup.config) + 4)  # room for a picture
    most = max(most or ROWS[0], least)
    return sorted(
        {max(least, min(most, ROWS[0])), least, *(size for size in ROWS if least <= size <= most)}, reverse=True
    )


def _fewest(setup: Setup, limit: int, known: Known, *, fixed: bool) -> Setup | None:
    """The setup with the fewest recomputed layers that fits; None when none does."""

    def fits(trial: Setup) -> bool:
        return _estimate(trial, known).peak_bytes <= limit

    if fixed:
        return setup if fits(setup) else None
    none, every = replace(setup, recompute_layers=0), replace(setup, recompute_layers=None)
    if fits(none):
        return none
    if not fits(every):
        return None
    low, high = 0, every.layers[1]
    while high - low > 1:
        middle = (low + high) // 2
        if fits(replace(setup, recompute_layers=middle)):
            high = middle
        else:
            low = middle
    return replace(setup, recompute_layers=high)


def _refusal(setup: Setup, found: Estimate, limit: int, fixed: Collection[str]) -> Plan:
    """The plan that comes nearest, and in its suggestion by how much it misses and what would fit."""
    ways = [{"lora_r": r} for r in (16, 8) if r < setup.lora_r]
    least = tokens_per_image(setup.config) + 100
    if "tokens_per_row" not in fixed:
        shorter = [n for n in (1024, 768) if least < n < setup.tokens_per_row]
        ways += [{"tokens_per_row": n} for n in shorter]
        ways += [{"lora_r": 8, "tokens_per_row": n} for n in shorter if setup.lora_r > 8]
    would = "a smaller model"
    for way in ways:
        if estimate(replace(setup, **way)).peak_bytes <= limit:  # type: ignore[arg-type]
            names = {"lora_r": "lora_r", "tokens_per_row": "max_length"}
            would = " with ".join(f"{names[name]} {value}" for name, value in way.items())
            break
    kept, again = setup.layers
    card = next((f" or a card of {size} GB" for size in CARDS if found.peak_bytes <= size * GB), "")
    sentence = (
        f"Training needs {format_bytes(found.peak_bytes)} at least ({setup.tokens_per_row} tokens a row, {again} of "
        f"{kept + again} layers recomputed, {setup.optim}), {format_bytes(found.peak_bytes - limit)} more than the "
        f"{format_bytes(limit)} that it may take; {would}{card} would do."
    )
    return Plan(setup.tokens_per_row, again, setup.optim, found, False, sentence)


def _estimate(setup: Setup, known: Known, *, whole: bool = False) -> Estimate:
    """The phase in which the most lives. known: what was measured of this setup before, whatever its optimizer."""
    kept, again = setup.layers
    start = (kept, again) if whole else (min(kept, 2), min(again, 2))
    phases, optimizer = _measured(setup, *start, known)
    phases = {name: Counter(parts) for name, parts in phases.items()}
    optimizer = Counter(optimizer)
    for missing, further in (
        (kept - start[0], (start[0] + 1, start[1])),
        (again - start[1], (start[0], start[1] + 1)),
    ):
        if not missing:
            continue
        base, one_more = _measured(setup, *start, known), _measured(setup, *further, known)
        for name, parts in phases.items():
            _extend(parts, base[0][name], one_more[0][name], missing)
        _extend(optimizer, base[1], one_more[1], missing)
    parts = max(phases.values(), key=lambda found: found.total())
    if setup.device == "cuda":
        parts["workspace"] += CONTEXT + int(FRAGMENTS * sum(parts[p] for p in ("activations", "logits", "workspace")))
    parts["optimizer"] = optimizer[setup.optim]
    named = {name: int(parts[name]) for name in PARTS}
    return Estimate(sum(named.values()), named)


def _extend(parts: Parts, base: Parts, further: Parts, times: int) -> None:
    """Add what one more layer adds, so many times."""
    for name in base.keys() | further.keys():
        parts[name] += times * (further[name] - base[name])


def _measured(setup: Setup, kept: int, again: int, known: Known) -> tuple[dict[str, Parts], Parts]:
    """Parts by phase, without the optimizer, and the bytes of each optimizer, for so many layers of each kind."""
    key = setup.tokens_per_row, kept, again
    if key in known:
        return known[key]
    config: Any = copy.deepcopy(setup.config)
    config.text_config.num_hidden_layers = kept + again
    row = tensors_of(
        config,
        example_row(config, setup.tokens_per_row, learned=setup.learned, samples_per_picture=setup.samples_per_picture),
    )
    with FakeTensorMode():
        model = fake_llava(
            config,
            load_in_4bit=setup.load_in_4bit,
            dtype=setup.dtype,
            lora_r=setup.lora_r,
            lora_dropout=setup.lora_dropout,
        ).train()
        prepare(model, setup, again)
        tracker = Tracker(config.text_config.vocab_size)
        fake_row = {
            name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
            for name, value in row.items()
        }
        with tracker:
            track_model(tracker, model)
            for tensor in (value for value in fake_row.values() if isinstance(value, torch.Tensor)):
                tracker.put(tensor, "activations")
            step_of_rows(model, tracker, fake_row, setup.dtype)
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    optimizers = Counter({optim: held_by(optim, sizes) for optim in {*OPTIMS, setup.optim}})
    for parts in tracker.peaks.values():
        optimizers[OPTIMS[0]] = parts.pop("optimizer")
    known[key] = tracker.peaks, optimizers
    return known[key]


def prepare(model: Any, setup: Setup, again: int) -> None:
    """What a run does to a model before its first step: rows, shortcuts, recomputation of the first layers."""
    llava = llava_of(model)
    exact.teach_rows(llava)
    exact.take_shortcuts(llava, setup)
    recompute(llava.model.language_model, again, preserve_rng_state=False)
