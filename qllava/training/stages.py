"""A stage of training as a value: what is trained on, how, and what distinguishes it from other stages.

Nothing asks for a stage's name to decide what to do: whatever differs between stages is a field here.
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
    """What distinguishes the stages of a LLaVA's training, whatever they are trained on."""

    name: str
    """As written in metrics.jsonl and spikes.jsonl."""
    title: str
    """For people."""
    adapter: bool
    """Whether LoRA is trained besides the projector."""
    rates: Mapping[str, float]
    """Settings of learning rates where none are given."""

    def rated(self, config: TrainConfig) -> TrainConfig:
        """Return a copy of the settings, with this stage's learning rates where none were given."""
        config = copy.copy(config)
        for name, rate in self.rates.items():
            if getattr(config, name) is None:
                setattr(config, name, rate)
        return config


ALIGNMENT = Kind("pretrain", "Stage 1", adapter=False, rates=PRETRAIN.rates)
"""The projector learns from captions."""
INSTRUCTION = Kind("finetune", "Stage 2", adapter=True, rates=FINETUNE.rates)
"""LoRA and the projector learn from conversations."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    kind: Kind
    """What distinguishes it from other stages."""
    template: Template
    """How its examples are written."""
    train: Prepared
    """Its samples."""
    evaluation: Prepared | None
    """Held-out samples."""
    questions: list[Example]
    """Some of the held-out examples, to be answered during the run."""
    folder: Path
    """Where it is written."""
    config: TrainConfig
    """The loop's settings."""
    begun_with: dict[str, Any]
    """What decides the run (`checkpoints.begun_with`): kept with every checkpoint."""
    final: Sequence[Example] = ()
    """Held-out examples whose questions are answered when training has ended."""
    saved: Callable[[], None] | None = None
    """Called after each checkpoint."""

    @property
    def projector_rate(self) -> float:
        """Learning rate of the projector: beside LoRA one of its own, where that is set."""
        own = self.config.projector_lr if self.kind.adapter else None
        rate = self.config.learning_rate if own is None else own
        assert rate is not None, "the kind's rates are in the settings"
        return float(rate)
