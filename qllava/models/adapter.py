"""Adapters: adding LoRA and projector to a base model, and saving and loading them.

projector.safetensors                          the projector: result of stage 1, start of stage 2
adapter_config.json, adapter_model.safetensors LoRA and the projector, in peft's layout
qllava.json                                    the `Recipe` of the base, with its fingerprint
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from qllava.config import InputError
from qllava.models.assemble import Assembled, assemble
from qllava.models.bases import at_its_base, located
from qllava.models.errors import LOAD_ERRORS, one_line
from qllava.models.layouts import projector_advice
from qllava.models.lora import Lora
from qllava.models.record import BELONGS_TO_BASE as BELONGS_TO_BASE
from qllava.models.record import Recipe
from qllava.models.record import adapter_at as adapter_at
from qllava.models.record import read_record as read_record
from qllava.models.record import save_record as save_record
from qllava.runs import ADAPTER_FILE, PROJECTOR_FILE


def add_lora(assembled: Assembled, lora: Lora) -> PeftModel:
    """Add LoRA to all linear layers of the language model, and make the projector trainable, in fp32.

    The model is changed in place.
    """
    with warnings.catch_warnings():
        # peft reads an attribute that transformers has deprecated.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model: Any = get_peft_model(assembled.model, lora.peft_config())
    _freeze_identity(model, assembled.recipe)
    _unmark(assembled.model)
    return model  # type: ignore[no-any-return]


def train_projector_only(assembled: Assembled) -> LlavaForConditionalGeneration:
    """Make only the projector trainable; the model is changed in place."""
    assembled.model.model.multi_modal_projector.requires_grad_(True)
    _freeze_identity(assembled.model, assembled.recipe)
    _unmark(assembled.model)
    return assembled.model


def _unmark(model: Any) -> None:
    """Remove the flags that mark a model as 4-bit; peft has read them before.

    TRL casts trainable weights of a marked model to bf16, where most updates of the projector are rounded away,
    and transformers refuses to train a marked model without an adapter, which stage 1 does.
    """
    model.is_loaded_in_4bit = model.is_quantized = False


def _freeze_identity(model: nn.Module, recipe: Recipe) -> None:
    """Freeze the second layer of a linear projector, which is the identity."""
    if recipe.model is None and recipe.projector_type == "linear":
        for name, parameter in model.named_parameters():
            if "multi_modal_projector" in name and ("linear_2" in name):
                parameter.requires_grad_(False)


def projector_state(model: nn.Module, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of the projector in use (under peft, the trained copy) on the CPU.

    Args:
        model: The model.
        state: State of the model, if it was gathered from several processes.

    Returns:
        Tensors by their names inside the projector.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in (model.state_dict() if state is None else state).items():
        if "multi_modal_projector" in name and "original_module" not in name:
            found[".".join(name.split(".")[-2:])] = tensor.detach().float().cpu()
    return found


def save_projector(model: nn.Module, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write `projector.safetensors` into a folder; for `state` see `projector_state`."""
    save_file(projector_state(model, state), folder / PROJECTOR_FILE)


def load_projector(model: Any, folder: Path) -> None:
    """Load the projector of a stage 1 run into a model that has no adapter yet.

    Raises:
        InputError: If the folder has no projector, or the projector has other shapes than the model.
    """
    path = folder / PROJECTOR_FILE
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}); {projector_advice(folder)}.") from error
    refuse_not_finite(state, path, "give another run of pretrain_projector")
    projector = model.model.multi_modal_projector
    own = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if own != given:
        differing = next(name for name in sorted(own.keys() | given.keys()) if own.get(name) != given.get(name))
        raise InputError(
            f"The projector {path} does not fit this model: {differing} has the shape {given.get(differing)}, and the "
            f"model needs {own.get(differing)}. Give a projector of the same tower, language model and projector_type."
        )
    projector.load_state_dict(state)


def refuse_not_finite(state: Mapping[str, torch.Tensor], path: Path, hint: str) -> None:
    """Raise InputError, naming the file and the tensor, if weights contain NaN or infinity."""
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path} cannot be used: {name} contains NaN or infinity; {hint}.")


def continue_adapter(model: PeftModel, folder: Path) -> None:
    """Load LoRA and projector of another run into a model of `add_lora`, to train them further.

    Raises:
        InputError: If the adapter has another shape or kind than the model.
    """
    given, own = Lora.of_folder(folder), Lora.of_model(model)
    if own is None or (given.r, given.alpha) != (own.r, own.alpha):
        raise InputError(
            f"The adapter in {folder} has lora_r {given.r} and lora_alpha {given.alpha}, and further training cannot "
            "change them. Remove both settings to train this adapter further, or merge "
            "the run and start from the merged model."
        )
    if given.variant != own.variant:
        raise InputError(
            f"The adapter in {folder} is of the kind {given.variant}, and runs train only {own.variant}. Merge "
            "the adapter and start from the merged model."
        )
    try:
        state = load_file(folder / ADAPTER_FILE)
        other = sorted(state.keys() ^ get_peft_model_state_dict(model).keys())
        if other:
            raise InputError(f"The adapter in {folder} does not fit this base: only one of them has {other[0]}.")
        refuse_not_finite(state, folder / ADAPTER_FILE, "give an earlier checkpoint, or another run")
        set_peft_model_state_dict(model, state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"The adapter in {folder} cannot be loaded ({one_line(error)}).") from error


def load_adapter(assembled: Assembled, folder: Path) -> PeftModel:
    """Load the adapter of a run or checkpoint onto its base, in eval mode.

    Raises:
        InputError: If the adapter cannot be read or does not fit the base.
    """
    if not (folder / ADAPTER_FILE).is_file():  # otherwise peft would unpickle adapter_model.bin, or query the hub
        raise InputError(f"The adapter in {folder} has no {ADAPTER_FILE}; copy it again (safetensors only).")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            model = PeftModel.from_pretrained(assembled.model, str(folder))
    except (*LOAD_ERRORS, TypeError) as error:
        raise InputError(f"The adapter in {folder} cannot be loaded ({one_line(error)}).") from error
    model.eval()
    return model


def load_run(folder: Path, base_model: Sequence[str | Path] = ()) -> tuple[Any, LlavaProcessor]:
    """Load the model of a run folder or one of its checkpoints as it was trained, in eval mode.

    The base is loaded in NF4 if it was trained in NF4.

    Args:
        folder: The run or checkpoint.
        base_model: New locations of parts of its base, if they have moved.

    Raises:
        InputError: If parts are missing, or the base is not the one of the run.
    """
    with at_its_base(folder):
        assembled = assemble(located(folder, base_model))
    return load_adapter(assembled, folder), assembled.processor
