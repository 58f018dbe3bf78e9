"""Choice of tokens per pack, recomputation and optimizer so that a run stays under a memory limit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from tqdm import tqdm

from qllava.config import InputError
from qllava.image_layout import ImageLayout
from qllava.training.memory.phases import Asking, Phase, phases_of
from qllava.training.memory.step import OPTIMS, PACK_SIZES, Estimate, Setup, estimate
from qllava.training.options.sizes import CARDS, GB, format_bytes
from qllava.training.settings import TrainConfig

_PER_PASS = 300
"""Tokens whose matrix products take as long as dequantizing all weights: 4.5 bytes of traffic per weight and 2 FLOP
per weight and token."""


@dataclass(frozen=True)
class Plan:
    """Chosen settings and their memory."""

    tokens_per_pack: int
    """Most tokens of a pack."""
    recompute_layers: int
    """Number of decoder layers, from the first, that are recomputed."""
    optim: str
    """Name of the optimizer."""
    estimate: Estimate
    """Estimate of a step."""
    phases: dict[str, int]
    """Bytes of each phase of the run (`phases.PHASES`); 0 for a phase that the run does not have."""
    fits: bool | None
    """Whether every phase stays under the limit; None without a limit."""
    suggestion: str
    """Advice, in one sentence."""

    @property
    def peak_bytes(self) -> int:
        """Bytes of the phase that needs most."""
        return max(self.phases.values())


class DoesNotFit(InputError):
    """Error: no allowed choice stays under the limit; `plan` is the closest one."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.suggestion)
        self.plan = plan


def settled(train: TrainConfig) -> set[str]:
    """Return the settings that the user fixed; `fit` must not change them."""
    chosen = {
        "tokens_per_pack": train.tokens_per_pack is not None,
        "recompute_layers": train.recompute_layers is not None or not train.gradient_checkpointing,
        "optim": train.optimizer != OPTIMS[0],
    }
    return {name for name, is_set in chosen.items() if is_set}


def fit(
    setup: Setup,
    limit: int,
    *,
    asking: Asking | None = None,
    least_tokens: int = 0,
    most_tokens: int | None = None,
    fixed: Collection[str] = (),
) -> Plan:
    """Return the fastest pack size, recomputation and optimizer with which every phase of a run fits a limit.

    The time per token is proportional to (2 + share of the layers that are recomputed) x (1 + 300 / tokens of a pack):
    two or three passes, each of which dequantizes the 4-bit weights once per pack. The optimizer is changed only if
    nothing fits otherwise.

    Args:
        setup: The run's settings.
        limit: Limit in bytes, CUDA's own context included.
        asking: The questions the run asks its model; their batches shrink to what fits, to one question at least.
        least_tokens: Minimum tokens of a pack: the longest sample, which is never cut.
        most_tokens: Maximum tokens of a pack; a larger one would never be filled.
        fixed: Which of tokens_per_pack, recompute_layers and optim keep the values of the setup.

    Raises:
        DoesNotFit: An InputError that says how much is missing and what would fit.
    """
    packs = _packs(setup, least_tokens, most_tokens, fixed)
    for optim in (setup.optim,) if "optim" in fixed else OPTIMS:
        found: list[tuple[float, Setup]] = []
        for tokens in tqdm(packs, desc="searching for settings that fit", leave=False, disable=None):
            # Smaller packs are at best as fast as without recomputation.
            if found and found[0][0] <= 2 * (1 + _PER_PASS / tokens):
                break
            trial = replace(setup, optim=optim, tokens_per_pack=tokens)
            fewest = _fewest(trial, limit, fixed="recompute_layers" in fixed)
            if fewest is not None:
                kept, again = fewest.layers
                found.append(((2 + again / (kept + again)) * (1 + _PER_PASS / tokens), fewest))
                found.sort(key=lambda one: one[0])
        if found:
            best = found[0][1]
            plan = plan_of(best, estimate(best), limit, asking)
            if plan.fits or optim == OPTIMS[-1] or "optim" in fixed:
                break
    if found:
        if plan.fits:
            return plan
        raise DoesNotFit(plan)
    smallest = replace(trial, tokens_per_pack=packs[-1])
    if "recompute_layers" not in fixed:
        smallest = replace(smallest, recompute_layers=None)
    nearest = estimate(smallest)
    sentence = _refusal(smallest, nearest, limit, fixed)
    plan = plan_of(smallest, nearest, limit, asking)
    raise DoesNotFit(replace(plan, fits=False, suggestion=sentence))


def plan_of(setup: Setup, found: Estimate, limit: int | None = None, asking: Asking | None = None) -> Plan:
    """Return the plan of a setup and its estimate for a limit, or without one for the smallest GPU that fits."""
    every = phases_of(setup, found, asking or Asking())
    least = max(phase.peak(setup) for phase in every.values())
    card = next((size for size in CARDS if least <= size * GB), None)
    room = limit or (card * GB if card else None)
    phases = {name: phase.peak(setup, room) for name, phase in every.items()}
    fits = None if limit is None else max(phases.values()) <= limit
    kept, again = setup.layers
    worst = max(phases, key=lambda name: phases[name])
    suggestion = (
        f"Set tokens_per_pack {setup.tokens_per_pack}, recompute_layers {again} (of {kept + again}) and optim "
        f"{setup.optim}, which fit_memory chooses automatically."
        if fits
        else f"The phase '{worst}' needs {format_bytes(phases[worst])}"
        f"{' even with one question at a time' if every[worst].questions else ''}, "
        f"{format_bytes(phases[worst] - limit)} more than the {format_bytes(limit)} limit: "
        f"{_advice(worst, every[worst], setup, limit)}{f' or a GPU with {card} GB' if card else ''}."
        if limit
        else f"A GPU with {card} GB is enough."
        if card
        else "No single GPU has enough memory. Use a smaller language model."
    )
    return Plan(setup.tokens_per_pack, again, setup.optim, found, phases, fits, suggestion)


def _advice(name: str, phase: Phase, setup: Setup, limit: int) -> str:
    """Return advice for a phase that does not fit."""
    ways = ["use a smaller model"]
    if name == "step":
        ways.insert(0, "lower lora_r or max_length")
    elif not setup.load_in_4bit:
        ways.insert(0, "load the language model in 4 bit (load_in_4bit true)")
    # Without held-out examples nothing is evaluated, and nothing is asked before the first step.
    if name == "evaluation" or (name == "before" and replace(phase, questions=0).peak(setup) <= limit):
        ways.insert(0, "set eval_strategy no")
    return ", or ".join(ways)


def _packs(setup: Setup, least: int, most: int | None, fixed: Collection[str]) -> list[int]:
    """Return the pack sizes to try, largest first."""
    if "tokens_per_pack" in fixed:
        return [setup.tokens_per_pack]
    least = max(least, ImageLayout.of_config(setup.config).tokens + 4)  # room for an image
    most = max(most or PACK_SIZES[0], least)
    return sorted(
        {max(least, min(most, PACK_SIZES[0])), least, *(size for size in PACK_SIZES if least <= size <= most)},
        reverse=True,
    )


def _fewest(setup: Setup, limit: int, *, fixed: bool) -> Setup | None:
    """Return the setup with the fewest recomputed layers that fits; None if none does."""

    def fits(trial: Setup) -> bool:
        return estimate(trial).peak_bytes <= limit

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


def _refusal(setup: Setup, found: Estimate, limit: int, fixed: Collection[str]) -> str:
    """Return the message that says by how much the smallest step misses the limit, and what would fit."""
    rank = setup.lora.r if setup.lora else 0
    ways = [{"lora_r": r} for r in (16, 8) if r < rank]
    least = ImageLayout.of_config(setup.config).tokens + 100
    if "tokens_per_pack" not in fixed:
        shorter = [n for n in (1024, 768) if least < n < setup.tokens_per_pack]
        ways += [{"tokens_per_pack": n} for n in shorter]
        ways += [{"lora_r": 8, "tokens_per_pack": n} for n in shorter if rank > 8]
    would = "a smaller model"
    for way in ways:
        lora = replace(setup.lora, r=way.get("lora_r", rank)) if setup.lora else None
        trial = replace(setup, lora=lora, tokens_per_pack=way.get("tokens_per_pack", setup.tokens_per_pack))
        if estimate(trial).peak_bytes <= limit:
            names = {"lora_r": "lora_r", "tokens_per_pack": "max_length"}
            would = " with ".join(f"{names[name]} {value}" for name, value in way.items())
            break
    kept, again = setup.layers
    card = next((f" or a GPU with {size} GB" for size in CARDS if found.peak_bytes <= size * GB), "")
    return (
        f"Training needs at least {format_bytes(found.peak_bytes)} ({setup.tokens_per_pack} tokens per pack, {again} "
        f"of {kept + again} layers recomputed, {setup.optim}), {format_bytes(found.peak_bytes - limit)} more than the "
        f"{format_bytes(limit)} limit. It would fit with {would}{card}."
    )
