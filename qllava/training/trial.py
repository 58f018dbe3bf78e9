"""Optimizer and scheduler of the settings, tried out on a small weight before a model is loaded."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from transformers import Trainer, get_scheduler

from qllava.config import InputError
from qllava.models.errors import one_line
from qllava.training.settings import TrainConfig

# What libraries raise for an argument that they do not take, a package or a device that is not there.
_ERRORS = (ImportError, ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError, OSError)
_SIDE = 64
"""bitsandbytes quantizes the state of weights of 4,096 numbers or more."""


def try_out(config: TrainConfig) -> None:
    """Take one step with the optimizer and the scheduler that a run would have.

    DeepSpeed and FSDP bring their own; with them nothing is tried.

    Raises:
        InputError: When one of them cannot be made, or cannot take a step, on this machine.
    """
    if config.deepspeed or config.fsdp:
        return
    config = copy.copy(config)
    config.learning_rate = 1e-4 if config.learning_rate is None else config.learning_rate
    weight = torch.nn.Parameter(torch.zeros(_SIDE, _SIDE, device=config.device))
    weight.grad = torch.ones_like(weight)
    shape: Any = config.lr_scheduler_kwargs
    setting = f"optim {config.optimizer}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself will warn
            kind, arguments = Trainer.get_optimizer_cls_and_kwargs(config)
            optimizer: Any = kind([{"params": [weight], "weight_decay": config.weight_decay}], **arguments)
            optimizer.step()
            setting = f"lr_scheduler_type {getattr(config.lr_scheduler_type, 'value', config.lr_scheduler_type)}"
            scheduler: Any = get_scheduler(
                config.lr_scheduler_type,
                optimizer,
                num_warmup_steps=1,
                num_training_steps=1000,
                scheduler_specific_kwargs=dict(shape or {}),
            )
            scheduler.step(*([1.0] if _follows_the_loss(config) else []))
    except _ERRORS as error:
        arguments_of = "optim_args" if setting.startswith("optim") else "lr_scheduler_kwargs"
        raise InputError(
            f"{setting} cannot be used here with its arguments ({one_line(error).rstrip('.')}); change it or "
            f"{arguments_of}."
        ) from error


def _follows_the_loss(config: TrainConfig) -> bool:
    return str(getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)) in (
        "reduce_lr_on_plateau",
        "greedy",
    )
