"""Choice of pack length, recomputation and optimizer so that a stage fits into memory."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qllava.models.assemble import Assembled
from qllava.models.lora import Lora
from qllava.training import scores
from qllava.training.durable import processes
from qllava.training.durable.checkpoints import optim_of
from qllava.training.memory import fit, format_bytes, parse_bytes, settled, setup_of
from qllava.training.stages import Stage
from qllava.training.step.kernels import computing_in


def fitted(stage: Stage, model: Any, assembled: Assembled, start: Path | None = None) -> tuple[Stage, list[str]]:
    """Choose pack size, recomputation and optimizer that fit the GPU, or `fit_memory`; explicit settings stay.

    Args:
        stage: The stage before the choice.
        model: The model that is trained.
        assembled: The model's parts.
        start: Checkpoint of a resumed run, whose optimizer stays too, because the state of one does not suit another.

    Returns:
        The stage with the chosen settings, and lines for the ledger.

    Raises:
        InputError: Nothing fits.
    """
    config, on_card = copy.copy(stage.config), torch.cuda.is_available()
    fixed = settled(config)
    if start is not None and (optim := optim_of(start)):
        config.optim = optim
        fixed.add("optim")
    stage = replace(stage, config=config)
    if not (on_card or config.fit_memory):
        return stage, []
    limits = [parse_bytes(config.fit_memory)] if config.fit_memory else []
    if on_card:  # a GPU sold with 8 GB has slightly less
        limits.append(torch.cuda.mem_get_info()[1])
    # With GPUs of different sizes, all ranks must choose the same packs and optimizer.
    limit = processes.lowest(min(limits))
    llava: Any = assembled.model
    setup = setup_of(config, llava.config, Lora.of_model(model), load_in_4bit=assembled.recipe.load_in_4bit)
    setup = replace(
        setup, device="cuda" if on_card else "cpu", dtype=computing_in(config, llava.dtype), held=llava.dtype
    )
    asking = scores.asking_of(config, setup.lora, held_out=stage.evaluation is not None)
    lengths = np.sort(stage.train.lengths)
    plan = fit(
        setup,
        limit,
        asking=asking,
        least_tokens=int(lengths[-1]),
        most_tokens=max(int(lengths[-config.per_device_train_batch_size :].sum()), int(lengths[-1])),
        fixed=fixed,
    )
    config.tokens_per_pack, config.recompute_layers, config.optim = (
        plan.tokens_per_pack,
        plan.recompute_layers,
        plan.optim,
    )
    # From here on `recompute_layers` is used instead.
    config.gradient_checkpointing = config.activation_checkpointing = False
    line = (
        f"memory: expected peak {format_bytes(plan.peak_bytes)} of {format_bytes(limit)}, with packs of "
        f"{plan.tokens_per_pack:,} tokens, {plan.recompute_layers} layers recomputed, {plan.optim}"
    )
    return stage, [line]
