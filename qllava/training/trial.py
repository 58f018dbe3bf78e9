"""Trial of the settings for optimizer, scheduler and recomputation on a small weight, before a model is loaded."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, get_scheduler

from qllava.config import InputError
from qllava.models.errors import one_line
from qllava.training.options.table import FOLLOWING
from qllava.training.settings import TrainConfig

_SIDE = 64
"""Side of the weight: bitsandbytes quantizes the state of weights of 4,096 values or more."""


def try_out(config: TrainConfig) -> None:
    """Recompute once, and take one step with the optimizer and the scheduler, as a run would.

    DeepSpeed uses its own optimizer and scheduler, which are not tried.

    Raises:
        InputError: One of them cannot be created, or cannot take a step, on this machine.
    """
    _recompute(config.activation_checkpointing_kwargs)
    if config.deepspeed:
        return
    config = copy.copy(config)
    config.learning_rate = 1e-4 if config.learning_rate is None else config.learning_rate
    weight = torch.nn.Parameter(torch.zeros(_SIDE, _SIDE, device=config.device))
    weight.grad = torch.ones_like(weight)
    setting = f"optim {config.optimizer}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself will warn
            kind, arguments = Trainer.get_optimizer_cls_and_kwargs(config)
            optimizer: Any = kind([{"params": [weight], "weight_decay": config.weight_decay}], **arguments)
            if callable(getattr(optimizer, "train", None)):  # schedule-free ones need it before a step
                optimizer.train()
            optimizer.step()
            setting = f"lr_scheduler_type {config.scheduler}"
            shape: Any = config.lr_scheduler_kwargs or {}
            scheduler: Any = get_scheduler(
                config.lr_scheduler_type,
                optimizer,
                num_warmup_steps=1,
                num_training_steps=1000,
                scheduler_specific_kwargs=dict(shape),
            )
            scheduler.step(*([1.0] if config.scheduler in FOLLOWING else []))
    except Exception as error:  # optimizers come from many packages, which raise different errors
        arguments_of = "optim_args" if setting.startswith("optim") else "lr_scheduler_kwargs"
        raise InputError(
            f"{setting} cannot be used with its arguments ({one_line(error).rstrip('.')}). Change it or {arguments_of}."
        ) from error


def _recompute(given: Any) -> None:
    """Raise an InputError for arguments that torch's recomputation does not accept."""

    def layer(hidden: torch.Tensor) -> torch.Tensor:
        return torch.relu(hidden)

    try:
        if given:
            checkpoint(layer, torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **given}).backward()
    except Exception as error:  # torch raises ValueError for some, and TypeError for others
        raise InputError(
            f"activation_checkpointing_kwargs (or gradient_checkpointing_kwargs, its alias) is {given}, and "
            f"torch.utils.checkpoint does not accept it ({one_line(error).rstrip('.')}). Correct or remove the setting."
        ) from error
