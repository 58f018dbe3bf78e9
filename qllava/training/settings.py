"""Settings of a run: TRL's `SFTConfig` with our defaults and fields, and how YAML and flags fill it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from trl import SFTConfig, TrlParser

from qllava.config import DataConfig, InputError, ModelConfig
from qllava.models.adapter import adapter_at, read_lora, read_record
from qllava.models.errors import one_line

# Fields of SFTConfig that would have no effect here, and why. A value other than TRL's default is refused.
NO_EFFECT = {
    "packing": "rows are laid out by qllava, with pictures",
    "packing_strategy": "rows are laid out by qllava, with pictures",
    "eval_packing": "rows are laid out by qllava, with pictures",
    "padding_free": "rows are laid out by qllava, with pictures",
    "assistant_only_loss": "answers alone are learned, always",
    "completion_only_loss": "answers alone are learned, always",
    "dataset_text_field": "rows are recognized by their own keys",
    "dataset_num_proc": "rows are encoded by the tokenizer's own threads",
    "chat_template_path": "the field `template` decides",
    "eos_token": "the template decides where a turn ends",
    "pad_token": "padding is never learned and never seen",
    "truncation_mode": "the field `too_long` decides",
    "pad_to_multiple_of": "rows are padded to the longest",
    "model_init_kwargs": "the model is assembled from its parts",
    "trust_remote_code": "no remote code is run",
    "use_liger_kernel": "TRL's fused head is used, which it would replace",
    "label_smoothing_factor": "only learned tokens have logits, and it needs all",
    "remove_unused_columns": "the collator takes what it needs",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "resume_from_checkpoint": "the newest checkpoint in output_dir is taken",
    "save_only_model": "a checkpoint holds all that it takes to continue",
    "push_to_hub": "nothing is published while it is being trained; upload the finished run's folder, or what "
    "`qllava merge` wrote",
    "data_seed": "the field `seed` draws the order too",
    "train_sampling_strategy": "samples about one picture come together, in an order that the seed draws",
    "load_best_model_at_end": "the last weights are the result; every checkpoint can be merged instead",
}


@dataclass
class TrainConfig(SFTConfig):
    """The loop's settings: all of TRL's, with LLaVA's recipe as defaults."""

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Of LoRA in stage 2 (2e-4) or of the projector in stage 1 (1e-3)."}
    )
    projector_lr: float | None = field(
        default=None, metadata={"help": "The projector's own learning rate in stage 2 (2e-5)."}
    )
    max_length: int | None = field(default=2048, metadata={"help": "Most tokens of a sample, image tokens counted."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "How often the data is gone through."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up: steps, or below 1 a share of all steps."})
    share_image_prefix: bool = field(
        default=True,
        metadata={"help": "Let samples about one image share its tokens; without dropout the loss is the same."},
    )
    tokens_per_row: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens that go through the model at once, by memory if not given. Without dropout the loss "
            "is the same."
        },
    )
    fit_memory: str | None = field(
        default=None,
        metadata={
            "help": "A limit such as 12GB: choose rows and recomputation to stay under it; else what the GPU has."
        },
    )
    recompute_layers: int | None = field(
        default=None,
        metadata={
            "help": "How many decoder layers are recomputed on the way back; all when gradient_checkpointing is set."
        },
    )
    stop_tower: bool = field(
        default=True, metadata={"help": "Compute no layer of the tower behind the one in use; the loss is the same."}
    )
    prune_last_layer: bool = field(
        default=True,
        metadata={
            "help": "Compute the last layer only where something is predicted; without dropout the loss is the same."
        },
    )
    lora_first: bool = field(
        default=True, metadata={"help": "Compute LoRA before its base layer, which recomputation then saves."}
    )
    compile_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Compile norms and gates of the decoder layers; when not given, where a trial on CUDA is faster."
        },
    )
    eval_questions: int = field(
        default=64, metadata={"help": "How many rows of eval_file are answered, for exact match, at each evaluation."}
    )
    eval_questions_final: int = field(
        default=1000,
        metadata={"help": "How many rows of eval_file are answered at the end, drawn by the seed."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Begin anew where a finished run lies; an unfinished one goes on."}
    )

    def __post_init__(self) -> None:
        if self.output_dir is None:
            self.output_dir = "runs/run"
        if self.bf16 is None and not self.fp16:
            # TRL's own default is bf16 wherever it runs: on a CPU that is slower and less exact.
            cuda = torch.cuda.is_available()
            self.bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
            self.fp16 = cuda and not self.bf16
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            # Untold, accelerate would take each of several processes for one that is alone.
            self.use_cpu = True
        if self.activation_checkpointing is None:
            # The old name is TRL's; transformers would warn of it in every run.
            self.activation_checkpointing = self.gradient_checkpointing
        # A page that cannot be swapped helps a copy to a GPU; without one torch only warns.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        evenly = self.eval_steps is None
        super().__post_init__()  # type: ignore[no-untyped-call]
        if evenly:
            # transformers would put logging_steps there; the stage chooses (`stage._evaluations`).
            self.eval_steps = None
        if self.n_gpu > 1:
            # One process takes one card: several are for several processes, not for torch's DataParallel.
            self._n_gpu = 1

    @property
    def optimizer(self) -> str:
        """The name of `optim`, which transformers makes a member of an enumeration."""
        return str(getattr(self.optim, "value", self.optim))


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig


def parse(args: Sequence[str] | None, *, output_dir: str, nano: dict[str, Any]) -> Settings:
    """Read `--config FILE.yaml` and flags.

    Args:
        args: the command line; None for the process's own.
        output_dir: where the run goes unless told otherwise.
        nano: values that take the place of the defaults when the model is nano; what the user sets explicitly wins.

    Raises InputError for a file that cannot be read, an unknown key, a value that is not possible, or a field that
    would have no effect. A wrong flag ends the process with status 2, as argparse does.
    """
    line = list(sys.argv[1:] if args is None else args)
    given = _read_yaml(line)
    model, _, asked = _parse(line, given, {"output_dir": output_dir})
    # Before the settings of the run: each of these sets accelerate's state anew, and the last one counts.
    untouched = TrainConfig(output_dir=output_dir, use_cpu=asked.use_cpu)
    defaults = {"output_dir": output_dir, **(nano if model.is_nano else {}), **_of_adapter(model.model_name_or_path)}
    model, data, train = _parse(line, given, defaults)
    for name, reason in NO_EFFECT.items():
        if getattr(train, name) != getattr(untouched, name):
            raise InputError(f"The setting {name} has no effect in qllava: {reason}; remove it.")
    for part in (model, data):
        _check_choices(part)
    return Settings(model, data, train)


def _of_adapter(name: str | None) -> dict[str, Any]:
    """Settings that a start from an adapter brings with it."""
    start = adapter_at(name)
    if start is None:
        return {}
    record, lora = read_record(start), read_lora(start)
    return {
        "lora_r": lora.r,
        "lora_alpha": lora.lora_alpha,
        **{
            name: getattr(record, name) for name in ("template", "load_in_4bit", "image_aspect", "vision_feature_layer")
        },
    }


def _check_choices(part: Any) -> None:
    """What argparse checks on the command line it does not check in a YAML."""
    for own in dataclasses.fields(part):
        value, choices = getattr(part, own.name), own.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise InputError(f"The setting {own.name} is {value!r}; possible are {', '.join(choices)}.")


def _parse(line: list[str], given: dict[str, Any], defaults: dict[str, Any]) -> tuple[Any, Any, Any]:
    fields: list[Any] = [ModelConfig, DataConfig, TrainConfig]
    parser = TrlParser(fields, usage="%(prog)s [--config FILE.yaml] [--FIELD VALUE ...]")
    parser.set_defaults_with_config(**defaults)
    unknown = parser.set_defaults_with_config(**given)
    known = [action.dest for action in parser._actions if action.dest != argparse.SUPPRESS]
    if unknown:
        key = unknown[0].removeprefix("--")
        raise InputError(f"The configuration has the unknown key {key!r}{_nearest(key, known)}")
    try:
        model, data, train, rest = parser.parse_args_into_dataclasses(args=line, return_remaining_strings=True)
    except (ValueError, TypeError) as error:
        raise InputError(f"The settings do not fit together: {one_line(error).rstrip('.')}.") from error
    if rest:
        key = rest[0].removeprefix("--").split("=")[0]
        parser.error(f"unknown argument {rest[0]}{_nearest(key, known)}")
    return model, data, train


def _nearest(key: str, known: list[str]) -> str:
    """The end of a sentence that says which key may have been meant."""
    # lora_rank is likelier lora_r than local_rank, which shares more letters with it.
    begun = sorted((k for k in known if k.startswith(key) or key.startswith(k)), key=lambda k: abs(len(k) - len(key)))
    close = begun or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "; see --help for all keys."


def _read_yaml(line: list[str]) -> dict[str, Any]:
    """Take `--config FILE` out of the command line and read the file."""
    for index, word in enumerate(line):
        if word == "--config" and index + 1 < len(line):
            path = line.pop(index + 1)
            line.pop(index)
        elif word.startswith("--config="):
            path = line.pop(index).partition("=")[2]
        else:
            continue
        try:
            given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"The configuration {path} cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"The configuration {path} is no YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
            raise InputError(f"The configuration {path} must hold `key: value` lines.")
        return given
    return {}
