"""Disk space: what a run will write is computed before its first step, and must fit.

A checkpoint holds the trained weights in fp32, the optimizer's moments, and the tokenizer. There are at most
`save_total_limit` checkpoints at one time, and the one that is being written.
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

# Bytes of settings, random states, manifest and report; of the lines logged per step; and of a token in tokenizer.json,
# which takes 110 to 135 in those of Llama 2, Llama 3 and Gemma.
_REST, _A_STEP, _A_TOKEN = 2_000_000, 400, 150


@dataclass(frozen=True)
class Need:
    """Disk space of a stage: its checkpoints and its result."""

    checkpoints: int
    """Maximum number of checkpoints at one time."""
    each: int
    """Bytes of each checkpoint."""
    result: int
    """Bytes of the result."""

    @property
    def total(self) -> int:
        """Total bytes."""
        return self.checkpoints * self.each + self.result


def needed(model: nn.Module, config: TrainConfig, tokenizer: Any, samples: int, *, lora: int | None = None) -> Need:
    """Return the disk space that a stage needs.

    Args:
        model: The model in its trained form.
        config: The loop's settings.
        tokenizer: Tokenizer saved with each checkpoint.
        samples: Number of samples in an epoch.
        lora: Number of LoRA's parameters if it is not yet in the model.
    """
    if lora is None:
        learned = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        lora = sum(p.numel() for name, p in learned if "multi_modal_projector" not in name)
    projector = sum(tensor.numel() for tensor in projector_state(model).values())
    # peft stores the projector in the adapter's file as well.
    weights = 4 * (lora + (2 if lora else 1) * projector)
    moments = (2 if "8bit" in config.optimizer else 8) * (lora + projector)
    steps = total_steps(config, samples)
    around = len(tokenizer) * _A_TOKEN + _REST + steps * _A_STEP
    return Need(at_one_time(config, steps), weights + moments + around, weights + around)


def at_one_time(config: TrainConfig, steps: int) -> int:
    """Return the maximum number of checkpoints at one time, including the one being written."""
    every = config.save_steps if config.save_steps >= 1 else config.save_steps * steps
    saves = {
        "no": 1,  # when a signal ends the run
        "epoch": math.ceil(config.num_train_epochs),
    }.get(name_of(config.save_strategy), math.ceil(steps / max(every, 1)))
    return min(saves, config.save_total_limit + 1) if config.save_total_limit else saves


def check(needs: Mapping[Path, Need]) -> None:
    """Check that the disk has space for what the stages will write, each into its own folder.

    Existing checkpoints of a stage count as available space: new ones replace them. All folders are on one disk.

    Raises:
        InputError: There is not enough space.
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
        f"{format_bytes(largest.each)}, and the result), and only {format_bytes(free)} are free. Free disk space, "
        "choose another output_dir, or keep fewer checkpoints (a lower save_total_limit, a larger save_steps)."
    )
