"""Defaults of each recipe: output folder, learning rates, and the settings of nano."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Found by experiment: nano has a thousandth of the parameters of a 7B and needs higher rates, and no recomputation.
NANO_PRETRAIN: dict[str, Any] = {
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1.0,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_strategy": "no",
}
NANO_FINETUNE: dict[str, Any] = {
    "lora_r": 32,
    "lora_alpha": 64,
    "learning_rate": 1e-3,
    "projector_lr": 1e-3,
    "per_device_train_batch_size": 12,
    "num_train_epochs": 1.0,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 2,
}
# On its own examples nano learns more at high rates in the few minutes that a first run may take. On other examples it
# learns less: handwritten digits 73.3 % instead of 95.3 % (`docs/nano.md`).
NANO_EXAMPLES: dict[str, Any] = {
    "learning_rate": 3e-3,
    "projector_lr": 3e-3,
    "save_steps": 125,
}

PRETRAIN_RATE, FINETUNE_RATE, PROJECTOR_RATE = 1e-3, 2e-4, 2e-5
"""Learning rates of LLaVA-1.5: of the projector in stage 1, of LoRA and of the projector in stage 2."""


@dataclass(frozen=True)
class Defaults:
    """Defaults of one recipe."""

    about: str
    """Description of the recipe, for `--help`."""
    output_dir: str
    """Folder of the run."""
    nano: Mapping[str, Any]
    """Settings for nano."""
    nanos_own: Mapping[str, Any]
    """Settings for nano on its own examples; they replace those of `nano`."""
    rates: Mapping[str, float]
    """Learning rates for all other models."""

    def for_parsing(self) -> dict[str, Any]:
        """Return the keyword arguments of `command.read` and `settings.parse`."""
        return {"output_dir": self.output_dir, "nano": self.nano, "nanos_own": self.nanos_own}


PRETRAIN = Defaults(
    "Stage 1: train a new projector on captions.",
    "runs/pretrain_projector",
    NANO_PRETRAIN,
    {},
    {"learning_rate": PRETRAIN_RATE},
)
FINETUNE = Defaults(
    "Stage 2: tune a LLaVA with LoRA on a 4-bit language model, together with the projector.",
    "runs/finetune_lora",
    NANO_FINETUNE,
    NANO_EXAMPLES,
    {"learning_rate": FINETUNE_RATE, "projector_lr": PROJECTOR_RATE},
)
