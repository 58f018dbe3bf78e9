"""What a recipe's YAML and flags may say, and the one error that a user is meant to read.

Most settings of the training loop are TRL's own (`SFTConfig`); `training/settings.py` joins them with these. Standard
library only, so that the command line stays instant.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

NANO = "nano"
"""The name of the embedded default, for a recipe: its parts."""
NANO_WEIGHTS = Path(__file__).parent / "nano" / "weights"
RENAMED = {"tokens_per_row": "tokens_per_pack"}
"""Old names of settings, as the `run.yaml` of older runs has them, and what they are called now."""


def cache_folder() -> Path:
    """Where data that can be made again is kept: `$QLLAVA_CACHE`, else `~/.cache/qllava`."""
    given = expanded(os.environ.get("QLLAVA_CACHE") or "~/.cache/qllava")
    if given.startswith("~"):
        raise InputError(
            f"{given} cannot be found, because this home folder does not exist; set QLLAVA_CACHE to a folder for what "
            "is kept between runs."
        )
    return Path(given)


class InputError(Exception):
    """What the user gave cannot be used.

    The message is one sentence that names the file, line or id, says what was expected and what to do. Commands
    print it without a stack trace and end with status 1.
    """


def expanded(name: str) -> str:
    """A path as the user typed it, with `~` replaced by the home folder; any other name as it is.

    The one place where `~` is read: a shell leaves it alone in `--flag=~/x`, and a YAML has no shell.
    """
    # Not Path's: without a home folder that one raises, and the name is then refused in words like any other.
    return os.path.expanduser(name) if name.startswith("~") else name  # noqa: PTH111


@dataclass
class ModelConfig:
    """Which parts make the model, and what of it learns."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "`nano` (the default), a LLaVA in llava-hf's layout (a folder or a hub name), or a run of "
            "finetune_lora, whose adapter is trained on."
        },
    )
    language_model: str | None = field(
        default=None, metadata={"help": "Build a new LLaVA from this LLaMA-family model: a folder or a hub name."}
    )
    vision_tower: str | None = field(
        default=None, metadata={"help": "The tower of the new LLaVA: open_clip:ARCH/PRETRAINED, or a folder."}
    )
    projector_type: str = field(
        default="mlp2x_gelu", metadata={"help": "Projector of a new LLaVA.", "choices": ["mlp2x_gelu", "linear"]}
    )
    projector: str | None = field(
        default=None, metadata={"help": "The folder that pretrain_projector wrote: start from its projector."}
    )
    vision_feature_layer: int = field(
        default=-2, metadata={"help": "The layer of the tower whose features are used; -2 is the one before the last."}
    )
    image_aspect: str = field(
        default="pad",
        metadata={
            "help": "How an image becomes a square: pad it, crop its centre, or squash it.",
            "choices": ["pad", "crop", "squash"],
        },
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "Conversation template; by model when not given, and `plain` in stage 1.",
            "choices": ["plain", "vicuna_v1", "llama_2", "llama_3", "chatml"],
        },
    )
    load_in_4bit: bool = field(default=True, metadata={"help": "Hold the language model in NF4, doubly quantized."})
    lora_r: int = field(default=64, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=128, metadata={"help": "Scale of LoRA; twice the rank works."})
    lora_dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout before LoRA; questions that share an image then share the mask of its tokens."},
    )
    base_model: list[str] | None = field(
        default=None,
        metadata={"help": "Where the base of the run in model_name_or_path is now, if it has moved."},
    )

    @property
    def is_nano(self) -> bool:
        """Whether these are nano's own parts."""
        return self.model_name_or_path == NANO or not (
            self.model_name_or_path or self.language_model or self.vision_tower
        )


@dataclass
class DataConfig:
    """What is learned from."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training examples: a file, or in a YAML a list of {path, repeat or weight, image_folder}. nano "
            "has its own."
        },
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Held-out examples, for loss and exact match during the run."}
    )
    image_folder: str | None = field(
        default=None,
        metadata={"help": "Folder that image paths are relative to; when not given, that of the data file."},
    )
    pretrain_file: str | None = field(
        default=None, metadata={"help": "Captions for an alignment of the projector before finetune_lora's own stage."}
    )
    too_long: str = field(
        default="error",
        metadata={"help": "What to do with a sample longer than max_length.", "choices": ["error", "drop", "trim"]},
    )
    skip_check: bool = field(
        default=False, metadata={"help": "Neither open the images nor compare examples before the run."}
    )


@dataclass
class LoopConfig:
    """Settings of the training loop: our own, and those of TRL's whose default is another one here."""

    learning_rate: float | None = field(
        default=None, metadata={"help": "Of LoRA in stage 2 (2e-4) or of the projector in stage 1 (1e-3)."}
    )
    projector_lr: float | None = field(
        default=None, metadata={"help": "The projector's own learning rate in stage 2 (2e-5)."}
    )
    max_length: int | None = field(default=2048, metadata={"help": "Most tokens of a sample, image tokens counted."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of passes over the data."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up: steps, or below 1 a share of all steps."})
    share_image_prefix: bool = field(
        default=True,
        metadata={"help": "Let samples about one image share its tokens; without dropout the loss is the same."},
    )
    tokens_per_pack: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens in one pack; by memory when not given. Without dropout the loss is the "
            "same."
        },
    )
    fit_memory: str | None = field(
        default=None,
        metadata={
            "help": "A limit such as 12GB: choose pack length and recomputation to stay under it; when not given, "
            "what the GPU has."
        },
    )
    recompute_layers: int | None = field(
        default=None,
        metadata={
            "help": "How many decoder layers are recomputed in the backward pass; all when gradient_checkpointing is "
            "set."
        },
    )
    stop_tower: bool = field(
        default=True,
        metadata={"help": "Compute no tower layer above the one in use; the loss is the same."},
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
        default=64, metadata={"help": "How many held-out examples are answered at each evaluation, for exact match."}
    )
    eval_questions_final: int = field(
        default=1000,
        metadata={"help": "How many held-out examples are answered at the end, drawn by the seed."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace a finished run; an unfinished one is resumed."}
    )
