"""`qllava plan`: estimate the memory of a run; only config.json files are downloaded.

The shapes of models in presets are included in qllava (`models.known`), those of any other come from its config.json,
and those of open_clip's towers from open_clip itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qllava.models.lora import Lora
from qllava.models.shapes import shapes_of
from qllava.training import memory
from qllava.training.options.defaults import NANO_FINETUNE
from qllava.training.scores import asking_of, expects_held_out
from qllava.training.settings import parse

_BAR = 30


def plan(
    *,
    config: str | None = None,
    model: str | None = None,
    language_model: str | None = None,
    vision_tower: str | None = None,
    lora_r: int | None = None,
    tokens_per_pack: int | None = None,
    limit: str | None = None,
    base_model: Sequence[str] = (),
) -> memory.Plan:
    """Estimate a run on a GPU, or on a CPU if the recipe sets use_cpu; this machine's devices do not matter.

    Without `config`, `model` and parts the run is nano's.

    Args:
        config: YAML file of a recipe.
        model: An existing LLaVA, instead of a recipe; the recipes' defaults apply.
        language_model: A language model, instead of a recipe.
        vision_tower: A vision tower, instead of a recipe.
        lora_r: Rank of LoRA; 0 for stage 1.
        tokens_per_pack: Most tokens of a pack.
        limit: Memory limit such as 12GB; settings that fit are chosen, except those that are set.
        base_model: New location of an adapter's base, as in the recipes.

    Raises:
        InputError: A config cannot be read.
    """
    line = ["--config", config] if config else []
    given: dict[str, Any] = {
        "model_name_or_path": model,
        "language_model": language_model,
        "vision_tower": vision_tower,
        "lora_r": lora_r,
        "tokens_per_pack": tokens_per_pack,
        "fit_memory": limit,
    }
    for name, value in given.items():
        line += [f"--{name}", str(value)] if value is not None else []
    line += ["--base_model", *base_model] if base_model else []
    settings = parse(line, output_dir="unused", nano=NANO_FINETUNE, elsewhere=True)
    train = settings.train
    chosen = settings.model
    lora = Lora.of_settings(chosen) if chosen.lora_r else None
    setup = memory.setup_of(train, shapes_of(chosen).config, lora, load_in_4bit=chosen.load_in_4bit)
    asking = asking_of(train, lora, held_out=expects_held_out(settings))
    if not train.fit_memory:
        return memory.plan_of(setup, memory.estimate(setup), asking=asking)
    try:
        return memory.fit(
            setup,
            memory.parse_bytes(train.fit_memory),
            asking=asking,
            least_tokens=setup.tokens_per_pack,
            fixed=memory.settled(train),
        )
    except memory.DoesNotFit as refusal:
        return refusal.plan


def as_json(plan: memory.Plan) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    chosen = {name: getattr(plan, name) for name in ("tokens_per_pack", "recompute_layers", "optim")}
    found = {"peak_bytes": plan.peak_bytes, "phases": plan.phases, "parts": plan.estimate.parts}
    return {**found, **chosen, "fits": plan.fits, "suggestion": plan.suggestion}


def as_text(plan: memory.Plan) -> str:
    """Format the peak of each phase, the parts of a step, and the advice."""
    lines = ["phase"] + _bars(plan.phases) + ["part of a step"] + _bars(plan.estimate.parts)
    lines.append(f"{'peak':<12} {memory.format_bytes(plan.peak_bytes):>9}")
    verdict = {None: "", True: "It fits. ", False: "It does not fit. "}[plan.fits]
    lines.append(
        f"with packs of {plan.tokens_per_pack:,} tokens, {plan.recompute_layers} layers recomputed, {plan.optim}; 1 GB "
        "is 2^30 bytes"
    )
    return "\n".join([*lines, f"{verdict}{plan.suggestion}"])


def _bars(sizes: dict[str, int]) -> list[str]:
    """Return a line with a bar for each size."""
    most = max(sizes.values())
    return [
        f"{name:<12} {memory.format_bytes(size):>9}  {'#' * round(_BAR * size / most)}".rstrip()
        for name, size in sizes.items()
    ]
