"""The settings of a recipe (YAML keys and flags), and the error class for invalid user input.

Most settings of the training loop are TRL's own (`SFTConfig`); `training/settings.py` joins them with these. Standard
library only, so that the command line stays instant.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

NANO = "nano"
"""Name of the built-in model nano, for a recipe: the model is built from nano's parts."""
NANO_WEIGHTS = Path(__file__).parent / "nano" / "weights"
NANO_IDENTITY = "9dfe501d91aa"
"""Last part of the fingerprint of nano's base, a hash of its weights; another value in a run means another nano."""
OLDER_NANO = (
    "was trained on another version of nano, whose weights are not in this version of qllava. Train again (the default "
    "run with make finetune ARGS=--overwrite_output_dir)."
)
"""What is said of a run on another nano."""
RENAMED = {"tokens_per_row": "tokens_per_pack"}
"""Old names of settings, found in the `run.yaml` of older runs, with their current names."""


def cache_folder() -> Path:
    """Return the folder for data that can be recreated: `$QLLAVA_CACHE`, else `~/.cache/qllava`."""
    given = expanded(os.environ.get("QLLAVA_CACHE") or "~/.cache/qllava")
    if given.startswith("~"):
        raise InputError(
            f"{given} cannot be found, because this home folder does not exist. Set QLLAVA_CACHE to a folder for "
            "cached data."
        )
    return Path(given)


class InputError(Exception):
    """Invalid input of the user.

    The message is one sentence that names the file, line or id, says what was expected and what to do. Commands
    print it without a stack trace and end with status 1.
    """


def expanded(name: str) -> str:
    """Return a path with `~` replaced by the home folder; return any other name unchanged.

    The only place that expands `~`: a shell does not expand `--flag=~/x`, and a YAML file has no shell.
    """
    # Not Path.expanduser, which raises without a home folder; the later check of the path has the better message.
    return os.path.expanduser(name) if name.startswith("~") else name  # noqa: PTH111


@dataclass
class ModelConfig:
    """Settings of the model: its parts, quantization and LoRA."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "`nano` (the default), a LLaVA in llava-hf's layout (a folder or a hub name), or a finetune_lora "
            "run whose adapter is trained further."
        },
    )
    language_model: str | None = field(
        default=None, metadata={"help": "Build a new LLaVA from this LLaMA-family model: a folder or a hub name."}
    )
    vision_tower: str | None = field(
        default=None, metadata={"help": "Vision tower of the new LLaVA: open_clip:ARCH/PRETRAINED, or a folder."}
    )
    projector_type: str = field(
        default="mlp2x_gelu", metadata={"help": "Projector type of a new LLaVA.", "choices": ["mlp2x_gelu", "linear"]}
    )
    projector: str | None = field(
        default=None, metadata={"help": "Start from the projector of this pretrain_projector run."}
    )
    vision_feature_layer: int = field(
        default=-2,
        metadata={"help": "Layer of the vision tower that image features are taken from; -2 is the last but one."},
    )
    image_aspect: str = field(
        default="pad",
        metadata={
            "help": "How to make an image square: pad it, crop its centre, or squash it.",
            "choices": ["pad", "crop", "squash"],
        },
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "Conversation template (default: by model; `plain` in stage 1).",
            "choices": ["plain", "vicuna_v1", "llama_2", "llama_3", "chatml"],
        },
    )
    load_in_4bit: bool = field(
        default=True, metadata={"help": "Load the language model in 4 bit: NF4 with double quantization."}
    )
    lora_r: int = field(default=64, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=128, metadata={"help": "LoRA alpha; twice the rank is a good choice."})
    lora_dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout before LoRA; samples that share image tokens share their dropout mask too."},
    )
    base_model: list[str] | None = field(
        default=None,
        metadata={"help": "New location of the base of the run in model_name_or_path, if the base has moved."},
    )

    @property
    def is_nano(self) -> bool:
        """Whether the model is built from nano's own parts."""
        return self.model_name_or_path == NANO or not (
            self.model_name_or_path or self.language_model or self.vision_tower
        )


@dataclass
class DataConfig:
    """Settings of the training and held-out data."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training examples: a file, or in a YAML a list of {path, repeat or weight, image_folder}. The "
            "default for nano is its own data."
        },
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Held-out examples, for loss and exact match during the run."}
    )
    image_folder: str | None = field(
        default=None,
        metadata={"help": "Folder that image paths are relative to (default: the folder of the data file)."},
    )
    pretrain_file: str | None = field(
        default=None,
        metadata={"help": "Captions to align the projector with (stage 1) before finetune_lora runs stage 2."},
    )
    too_long: str = field(
        default="error",
        metadata={
            "help": "What to do with a sample that is longer than max_length.",
            "choices": ["error", "drop", "trim"],
        },
    )
    skip_check: bool = field(
        default=False,
        metadata={"help": "Skip the check of the data, which opens every image and compares all examples."},
    )


@dataclass
class LoopConfig:
    """Settings of the training loop: qllava's own, and TRL's settings that have another default here."""

    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of LoRA in stage 2 (2e-4), or of the projector in stage 1 (1e-3)."},
    )
    projector_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector in stage 2 (2e-5)."}
    )
    max_length: int | None = field(
        default=2048, metadata={"help": "Maximum number of tokens in a sample, image tokens included."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of passes over the data."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up: number of steps, or below 1 the fraction of all steps."}
    )
    share_image_prefix: bool = field(
        default=True,
        metadata={"help": "Compute image tokens once for all samples about it; without dropout the loss is unchanged."},
    )
    tokens_per_pack: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens in one pack (default: by memory). Without dropout the loss is unchanged."
        },
    )
    fit_memory: str | None = field(
        default=None,
        metadata={
            "help": "Memory limit such as 12GB; choose pack length and recomputation to stay below it (default: the "
            "memory of the GPU)."
        },
    )
    recompute_layers: int | None = field(
        default=None,
        metadata={
            "help": "Number of decoder layers to recompute in the backward pass (default: all if "
            "gradient_checkpointing is set)."
        },
    )
    stop_tower: bool = field(
        default=True,
        metadata={"help": "Skip vision tower layers above vision_feature_layer; the loss does not change."},
    )
    prune_last_layer: bool = field(
        default=True,
        metadata={
            "help": "Compute the last layer only for tokens that predict a learned token; without dropout the loss "
            "is unchanged."
        },
    )
    lora_first: bool = field(
        default=True,
        metadata={"help": "Compute LoRA before its base layer, so that recomputation can skip the base layer."},
    )
    compile_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Compile norms and gates of the decoder layers (default: on CUDA, if a trial finds it faster)."
        },
    )
    eval_questions: int = field(
        default=64, metadata={"help": "Number of held-out questions to answer at each evaluation, for exact match."}
    )
    eval_questions_final: int = field(
        default=1000,
        metadata={"help": "Number of held-out questions to answer at the end of the run, drawn with the seed."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace a finished run in output_dir. An unfinished run is resumed."}
    )
