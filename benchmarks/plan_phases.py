"""Table of the planned memory of every preset, phase by phase, from fake tensors at full size.

    python benchmarks/plan_phases.py --out benchmarks/results/plan_phases.json

It needs no network and no GPU. Packs have max_length and all layers are recomputed, the smallest need of a preset; with
`--fit` both are chosen as in a run, which takes a minute or two per preset.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import provenance
from benchmarks.tables import format_table
from qllava.models.lora import Lora
from qllava.models.shapes import shapes_of
from qllava.surroundings import prepare_process
from qllava.training import memory, scores
from qllava.training.options.defaults import NANO_FINETUNE
from qllava.training.settings import parse

PRESETS = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))


def stages(preset: Path) -> list[str]:
    """Return the stages that a preset is for: both, unless its name or its model says otherwise."""
    if preset.stem.endswith(("_pretrain", "_finetune")):
        return [preset.stem.rpartition("_")[2]]
    return ["finetune"] if preset.stem.startswith("llava15") else ["pretrain", "finetune"]


def planned(preset: Path, stage: str, *, fit: bool) -> dict[str, Any]:
    """Return a line of the table: the memory of each phase of a preset's stage, in GB of 2**30 bytes."""
    settings = parse(["--config", str(preset)], output_dir="unused", nano=NANO_FINETUNE)
    model, lora = settings.model, Lora.of_settings(settings.model) if stage == "finetune" else None
    setup = memory.setup_of(settings.train, shapes_of(model).config, lora, load_in_4bit=model.load_in_4bit)
    asking = scores.asking_of(settings.train, lora, held_out=scores.expects_held_out(settings))
    limit = memory.parse_bytes(str(settings.train.fit_memory))
    if fit:
        fixed = memory.settled(settings.train)
        plan = memory.fit(setup, limit, asking=asking, least_tokens=setup.tokens_per_pack, fixed=fixed)
    else:
        plan = memory.plan_of(setup, memory.estimate(setup), limit, asking)
    return {
        "preset": preset.stem,
        "stage": stage,
        "card_gb": limit / memory.GB,
        **{name: size / memory.GB for name, size in plan.phases.items()},
        "tokens": plan.tokens_per_pack,
        "recomputed": plan.recompute_layers,
        "optim": plan.optim,
        "fits": plan.fits,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan every preset, write after each, and print the table; return 1 if a phase does not fit its GPU."""
    parser = argparse.ArgumentParser(description="Compute the planned memory of every preset by phase.")
    parser.add_argument("--fit", action="store_true", help="choose packs, recomputation and optimizer as a run does")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_phases.json"))
    given = parser.parse_args(arguments)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for preset in PRESETS:
        for stage in stages(preset):
            lines.append(planned(preset, stage, fit=given.fit))
            result = {**provenance("cpu"), "chosen_by_fit": given.fit, "presets": lines}
            given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(format_table(lines))
    return 0 if all(line["fits"] for line in lines) else 1


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
