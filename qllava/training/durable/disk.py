"""The disk: what a run will write is computed before its first step, and has to fit.

A checkpoint holds the weights that are trained, in fp32, the optimizer's moments, and the tokenizer; as many are there
at one time as `save_total_limit` keeps, and the one that is being written.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qllava.config import InputError
from qllava.models.adapter import projector_state
from qllava.runs import PARTIAL, Run
from qllava.training.durable.order import total_steps
from qllava.training.memory import format_bytes
from qllava.training.settings import TrainConfig, name_of

# Settings, random states, manifest, report; the lines that are logged of a step; a token in tokenizer.json, which takes
# 110 to 135 bytes in those of Llama 2, Llama 3 and Gemma.
_REST, _A_STEP, _A_TOKEN = 2_000_000, 400, 150


@dataclass(frozen=True)
class Need:
    """What a stage writes: so many checkpoints at one time, of so many bytes each, and its result."""

    checkpoints: int
    each: int
    result: int

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.checkpoints * self.each + self.result


def needed(model: nn.Module, config: TrainConfig, tokenizer: Any, samples: int, *, lora: int | None = None) -> Need:
    """What a stage will write.

    model: as it is trained. samples: of an epoch. lora: its parameters where they are still to be put on.
    """
    if lora is None:
        learned = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        lora = sum(p.numel() for name, p in learned if "multi_modal_projector" not in name)
    projector = sum(tensor.numel() for tensor in projector_state(model).values())
    # peft keeps the projector in its own file too.
    weights = 4 * (lora + (2 if lora else 1) * projector)
    moments = (2 if "8bit" in config.optimizer else 8) * (lora + projector)
    steps = total_steps(config, samples)
    around = len(tokenizer) * _A_TOKEN + _REST + steps * _A_STEP
    return Need(at_one_time(config, steps), weights + moments + around, weights + around)


def at_one_time(config: TrainConfig, steps: int) -> int:
    """How many checkpoints there are at most, the one that is being written among them."""
    every = config.save_steps if config.save_steps >= 1 else config.save_steps * steps
    saves = {
        "no": 1,  # when a signal ends the run
        "epoch": math.ceil(config.num_train_epochs),
    }.get(name_of(config.save_strategy), math.ceil(steps / max(every, 1)))
    return min(saves, config.save_total_limit + 1) if config.save_total_limit else saves


def check(needs: Mapping[Path, Need]) -> None:
    """Whether what stages will write, each into its folder, fits. Raises InputError when it does not.

    Checkpoints that a stage has already are part of it: they make way for new ones. All folders are on one disk.
    """
    there = 0
    for folder in needs:
        places = [*Run(folder).checkpoints(), folder / PARTIAL]
        there += sum(file.stat().st_size for place in places for file in place.rglob("*") if file.is_file())
    run = min(needs, key=lambda folder: len(folder.parts))
    total, free = sum(need.total for need in needs.values()) - there, shutil.disk_usage(run).free
    if total <= free:
        return
    largest = max(needs.values(), key=lambda need: need.total)
    kept = "one checkpoint" if largest.checkpoints == 1 else f"up to {largest.checkpoints} checkpoints"
    raise InputError(
        f"There is not enough disk space: the run needs {format_bytes(total)} in {run} ({kept} of "
        f"{format_bytes(largest.each)}, and the result), and only {format_bytes(free)} are free. Make room, choose "
        "another output_dir, or keep fewer checkpoints (a lower save_total_limit, a larger save_steps)."
    )
