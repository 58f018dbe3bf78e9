"""The model that a run trains: the parts of its settings, a LLaVA that exists, or the base of an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from qllava.config import InputError
from qllava.models.adapter import BELONGS_TO_BASE, add_lora, continue_adapter
from qllava.models.assemble import Assembled, assemble
from qllava.models.bases import at_its_base, located
from qllava.models.lora import Lora
from qllava.models.record import Recipe
from qllava.training.memory.allocator import keep_freed_memory
from qllava.training.settings import Settings


def assembled(settings: Settings, start: Path | None = None) -> Assembled:
    """Return the model of the settings, or the base of an adapter; `before.py` has checked that the settings fit it.

    Args:
        settings: Settings of the run.
        start: The adapter from which training starts.
    """
    set_seed(settings.train.seed)
    if not torch.cuda.is_available():
        keep_freed_memory()
    if start:
        with at_its_base(start):
            return assemble(same_base(settings, start), seed=settings.train.seed)
    return assemble(Recipe.of_settings(settings.model), seed=settings.train.seed)


def same_base(settings: Settings, start: Path) -> Recipe:
    """Return the recipe of an adapter's base, or raise an InputError if a setting contradicts it."""
    record = located(start, settings.model.base_model or ())
    for name in BELONGS_TO_BASE:
        if getattr(settings.model, name) != getattr(record, name):
            raise InputError(
                f"The adapter in {start} was trained with {name} {getattr(record, name)}. Remove the setting, or "
                "merge the run and start from the merged model."
            )
    # The type of the weights depends on this device.
    return replace(record, dtype="")


def with_lora(settings: Settings, assembled: Assembled, start: Path | None) -> Any:
    """Return the model with LoRA: newly initialized so that it changes nothing, or loaded from an adapter."""
    set_seed(settings.train.seed)  # same initial LoRA, whether stage 1 ran in this process or in an earlier one
    model = add_lora(assembled, Lora.of_settings(settings.model))
    if start:
        continue_adapter(model, start)
    return model
