"""A stage of training as a value: its data, its settings, and what distinguishes it from other stages.

No code checks a stage's name to decide what to do: every difference between stages is a field here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qllava.conversation import Template
from qllava.data.formats import Example
from qllava.training.data import Prepared
from qllava.training.options.defaults import FINETUNE, PRETRAIN
from qllava.training.settings import TrainConfig


@dataclass(frozen=True)
class Kind:
    """Properties that distinguish the stages of a LLaVA's training, independent of the data."""

    name: str
    """Name in metrics.jsonl and spikes.jsonl."""
    title: str
    """Name in messages."""
    adapter: bool
    """Whether LoRA is trained in addition to the projector."""
    rates: Mapping[str, float]
    """Default settings of learning rates."""

    def rated(self, config: TrainConfig) -> TrainConfig:
        """Return a copy of the settings with this stage's default learning rates filled in."""
        config = copy.copy(config)
        for name, rate in self.rates.items():
            if getattr(config, name) is None:
                setattr(config, name, rate)
        return config


ALIGNMENT = Kind("pretrain", "Stage 1", adapter=False, rates=PRETRAIN.rates)
"""Pretraining: the projector learns from captions."""
INSTRUCTION = Kind("finetune", "Stage 2", adapter=True, rates=FINETUNE.rates)
"""Instruction tuning: LoRA and the projector learn from conversations."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    kind: Kind
    """Properties that distinguish it from other stages."""
    template: Template
    """Template in which its examples are written."""
    train: Prepared
    """Training samples."""
    evaluation: Prepared | None
    """Held-out samples."""
    questions: list[Example]
    """Held-out examples whose questions are asked during the run."""
    folder: Path
    """Folder of its files."""
    config: TrainConfig
    """The loop's settings."""
    begun_with: dict[str, Any]
    """Settings and data that decide the results (`checkpoints.begun_with`); every checkpoint records them."""
    final: Sequence[Example] = ()
    """Held-out examples whose questions are answered after training."""
    saved: Callable[[], None] | None = None
    """Function called after each checkpoint."""

    @property
    def projector_rate(self) -> float:
        """Learning rate of the projector: with LoRA `projector_lr`, if it is set."""
        own = self.config.projector_lr if self.kind.adapter else None
        rate = self.config.learning_rate if own is None else own
        assert rate is not None, "the kind's rates are in the settings"
        return float(rate)
