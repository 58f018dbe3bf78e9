"""`load` and `load_as`: load a model by name and return a `Chat`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qllava.config import InputError
from qllava.inference.chat import Chat
from qllava.models.threads import settle_threads
from qllava.runs import Run, folder_of


def load(
    model: str,
    *,
    load_in_4bit: bool = False,
    dtype: str | None = None,
    base_model: str | Path | Sequence[str | Path] = (),
) -> Chat:
    """Load `nano` (the newest finished nano run in ./runs), a merged folder, a run folder, or a hub name.

    A run folder is always its base exactly as it was trained (in 4 bit if it was), plus the adapter; `load_in_4bit` and
    `dtype` do not change that.

    Args:
        model: Name or folder of the model.
        load_in_4bit: Keep the language model in NF4.
        dtype: torch's name of a type; None for fp32 on the CPU, bf16 on CUDA (fp16 if the GPU has no bf16).
        base_model: Current locations of the parts of a run's base, if they have moved.

    Raises:
        InputError: The model does not exist, or its base is another one.
    """
    folder = folder_of(model)
    if Run(folder).has_adapter:
        from qllava.models.adapter import load_run

        network, processor = load_run(folder, [base_model] if isinstance(base_model, str | Path) else base_model)
        settle_threads(network)
        return Chat(network.eval(), processor, str(folder))
    if base_model:
        raise InputError(f"{model} is not a run with an adapter, so it has no separate base. Remove --base-model.")
    if said := Run(folder).without_model:
        raise InputError(said)
    from qllava.models.assemble import nf4
    from qllava.models.checkpoint import load_llava
    from qllava.models.outline import compute_dtype

    cuda = torch.cuda.is_available()
    compute: torch.dtype = getattr(torch, dtype) if dtype else compute_dtype()
    network, processor = load_llava(
        str(folder) if folder.is_dir() else model,
        dtype=compute,
        quantization_config=nf4(compute) if load_in_4bit else None,
        device_map={"": "cuda:0"} if cuda else None,
    )
    settle_threads(network)
    return Chat(network.eval(), processor, model)


@dataclass(frozen=True)
class Loading:
    """How models for chat are loaded."""

    load_in_4bit: bool | None = False
    """Keep the language model in NF4; None for on CUDA only."""
    dtype: str | None = None
    """torch's name of the type of the weights; None to choose by device."""
    base_model: tuple[str, ...] = ()
    """Current locations of the parts of a run's base, if they have moved."""
    recommended_sampling: bool = False
    """Sample with the model's own values."""


def load_as(model: str, how: Loading) -> Chat:
    """Load a model as `load` does, with the settings of `how`.

    Raises:
        InputError: The model does not exist, or its base is another one.
    """
    four_bit = torch.cuda.is_available() if how.load_in_4bit is None else how.load_in_4bit
    chat = load(model, load_in_4bit=four_bit, dtype=how.dtype, base_model=how.base_model)
    return replace(chat, recommended_sampling=how.recommended_sampling)


def load_pair(first: str, second: str, how: Loading) -> tuple[Chat, Chat]:
    """Load two models to compare; the same model is loaded once and returned twice.

    A moved base applies to the runs among them.

    Raises:
        InputError: A model does not exist, or its base is another one.
    """

    def loaded(model: str) -> Chat:
        return load_as(model, how if has_base(model) else replace(how, base_model=()))

    chat = loaded(first)
    return chat, chat if same_model(first, second) else loaded(second)


def has_base(model: str) -> bool:
    """Return whether a name means a run, whose base may have moved."""
    return Run(folder_of(model)).has_adapter


def same_model(first: str, second: str) -> bool:
    """Return whether two names mean the same model, such as `nano` and the folder of its newest run."""
    folders = [folder_of(name) for name in (first, second)]
    return first == second or (all(path.is_dir() for path in folders) and folders[0].samefile(folders[1]))
