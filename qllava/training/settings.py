"""Settings of a run: TRL's `SFTConfig` with our defaults and fields, filled from what `command.py` has read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from trl import SFTConfig, TrlParser

from qllava.config import DataConfig, InputError, LoopConfig, ModelConfig
from qllava.models.errors import one_line
from qllava.models.lora import Lora
from qllava.models.record import BELONGS_TO_BASE, adapter_at, read_record
from qllava.training.durable.processes import unlaunched
from qllava.training.options.command import Given, read


@dataclass
class TrainConfig(LoopConfig, SFTConfig):  # type: ignore[misc]  # a default of None where TRL has a number
    """The loop's settings: all of TRL's, with LLaVA's recipe as defaults."""

    def __post_init__(self) -> None:
        if self.output_dir is None:
            self.output_dir = "runs/run"
        self._asks_cpu = bool(self.use_cpu)
        if self.bf16 is None and not self.fp16:
            # TRL's own default is bf16 everywhere: on a CPU that is slower and less exact.
            cuda = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
            self.fp16 = cuda and not self.bf16
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not several:
            self.ddp_backend = None  # one process has no group, and accelerate would look for one
        if not _has_gpu() and (self.bf16 or several):
            # Otherwise transformers refuses bf16 on a CPU, and accelerate treats each of several processes as the only
            # one.
            self.use_cpu = True
        if self.activation_checkpointing is None:
            # The old name is TRL's; transformers would warn about it in every run.
            self.activation_checkpointing = self.gradient_checkpointing
        # Pinned memory speeds up copies to a GPU; without one torch only warns.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        evenly = self.eval_steps is None
        super().__post_init__()  # type: ignore[no-untyped-call]
        if evenly:
            # transformers would use logging_steps; the stage chooses instead (`evaluations.settle`).
            self.eval_steps = None
        if self.n_gpu > 1:
            # One process uses one GPU: several GPUs are for several processes, not for torch's DataParallel.
            self._n_gpu = 1

    @property
    def asks_cpu(self) -> bool:
        """Whether the user set `use_cpu`; the field itself is also true on a machine without a GPU."""
        return self._asks_cpu

    @property
    def optimizer(self) -> str:
        """Name of `optim`, which transformers turns into an enumeration member."""
        return name_of(self.optim)

    @property
    def scheduler(self) -> str:
        """Name of `lr_scheduler_type`."""
        return name_of(self.lr_scheduler_type)


def name_of(choice: Any) -> str:
    """Return a choice as the user writes it; transformers turns most choices into enumeration members."""
    return str(getattr(choice, "value", choice))


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    model: ModelConfig
    """The model and LoRA."""
    data: DataConfig
    """The data."""
    train: TrainConfig
    """The training loop."""
    explicit: frozenset[str] = frozenset()
    """Names of the fields that the user set, in the YAML or by a flag; all others have their defaults."""

    @property
    def nanos_own(self) -> bool:
        """Whether nano trains on its own examples, so that its held-out ones and its table belong to the run."""
        return self.model.is_nano and not self.data.train_file


def parse(
    args: Sequence[str],
    *,
    output_dir: str,
    nano: Mapping[str, Any],
    nanos_own: Mapping[str, Any] = MappingProxyType({}),
    elsewhere: bool = False,
) -> Settings:
    """Read `--config FILE.yaml` and flags.

    Args:
        args: The command line.
        output_dir: The run's folder unless the settings name one.
        nano: Defaults that apply if the model is nano; settings of the user take precedence.
        nanos_own: Defaults that replace those of `nano` if it trains on its own examples.
        elsewhere: The settings are only read here, for a run on another machine: see `resolve`.

    Raises:
        InputError: A file cannot be read, a key is unknown, a value is not possible, or a field would have no effect.
            A wrong flag ends the process with status 2, as argparse does.
    """
    given = read(args, output_dir=output_dir, nano=nano, nanos_own=nanos_own)
    return resolve(given, elsewhere=elsewhere)


def resolve(given: Given, *, elsewhere: bool = False) -> Settings:
    """Return the complete settings of a parsed command line; TRL's parser fills in the rest.

    Args:
            given: Settings of the user.
            elsewhere: The run will be on another machine, so settings are not refused for what this machine lacks.

        Raises:
            InputError: Values contradict each other, or do not suit this machine.
    """
    parts: list[Any] = [ModelConfig, DataConfig, TrainConfig]
    parser = TrlParser(parts)
    values = {**given.defaults, **_of_adapter(given.values.get("model_name_or_path")), **given.values}
    if isinstance(values.get("debug"), list):
        values["debug"] = " ".join(values["debug"])  # transformers splits it again
    if elsewhere:
        values.pop("tf32", None)  # transformers would look for a GPU that supports it, and switch it on
    parser.set_defaults_with_config(**values)
    try:
        with unlaunched() if elsewhere else nullcontext():
            # Otherwise TRL also reads flags from a file PROGRAM.args, which nobody expects.
            model, data, train = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
    except (ValueError, TypeError, OSError, KeyError, ImportError) as error:
        raise InputError(f"The settings contradict each other: {one_line(error).rstrip('.')}.") from error
    if not elsewhere:
        _refuse_what_is_not_here(train)
    return Settings(model, data, train, frozenset(given.values))


def _refuse_what_is_not_here(train: TrainConfig) -> None:
    """Raise an InputError if this machine lacks what the settings need."""
    if train.asks_cpu and torch.cuda.is_available():
        # The recipes hide GPUs before torch is imported; in this process it was imported earlier.
        raise InputError(
            "use_cpu is set, but torch has already found a GPU. Start the program with CUDA_VISIBLE_DEVICES=''."
        )
    if train.fp16 and (train.asks_cpu or not _has_gpu()):
        raise InputError(
            "The setting fp16 needs a GPU, and this machine has none. Remove fp16 (a CPU computes in fp32)."
        )
    if train.activation_offloading and (train.asks_cpu or not _has_gpu()):
        raise InputError(
            "The setting activation_offloading needs a GPU, and this machine has none. Remove activation_offloading."
        )


def _has_gpu() -> bool:
    return torch.accelerator.is_available() or torch.cuda.is_available()


def _of_adapter(name: str | None) -> dict[str, Any]:
    """Return the settings that an adapter brings when training starts from it."""
    start = adapter_at(name)
    if start is None:
        return {}
    record = read_record(start)
    lora = Lora.of_folder(start)
    return {"lora_r": lora.r, "lora_alpha": lora.alpha, **{name: getattr(record, name) for name in BELONGS_TO_BASE}}
