"""What each recipe does where the user sets nothing: its folder, its learning rates, and what nano needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Found by trying: nano is a thousandth of a 7B, and learns at higher rates, without recomputation.
NANO_PRETRAIN: dict[str, Any] = {
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 32,
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
    "per_device_train_batch_size": 24,
    "num_train_epochs": 1.0,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 2,
}

PRETRAIN_RATE, FINETUNE_RATE, PROJECTOR_RATE = 1e-3, 2e-4, 2e-5
"""Learning rates of LLaVA-1.5: the projector's in stage 1, LoRA's and the projector's in stage 2."""


@dataclass(frozen=True)
class Defaults:
    """One recipe's."""

    about: str
    """What it does, for `--help`."""
    output_dir: str
    """Where it writes."""
    nano: Mapping[str, Any]
    """Settings of nano's own."""
    rates: Mapping[str, float]
    """Learning rates of any other model."""

    def for_parsing(self) -> dict[str, Any]:
        """The arguments of `command.read` and `settings.parse`."""
        return {"output_dir": self.output_dir, "nano": self.nano}


PRETRAIN = Defaults(
    "Stage 1: align a new projector with captions.",
    "runs/pretrain_projector",
    NANO_PRETRAIN,
    {"learning_rate": PRETRAIN_RATE},
)
FINETUNE = Defaults(
    "Tune a LLaVA: LoRA on a 4-bit language model, and the projector.",
    "runs/finetune_lora",
    NANO_FINETUNE,
    {"learning_rate": FINETUNE_RATE, "projector_lr": PROJECTOR_RATE},
)
