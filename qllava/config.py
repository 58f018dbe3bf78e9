"""What a recipe's YAML and flags may say about model and data, and the one error that a user is meant to read.

The settings of the loop itself are TRL's `SFTConfig`; `training/settings.py` joins the three. Standard library only,
so that the command line stays instant.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

NANO = "nano"
"""The name of the embedded default, for a recipe: its parts."""
NANO_WEIGHTS = Path(__file__).parent / "nano" / "weights"


def cache_folder() -> Path:
    """Where data that can be made again is kept: `$QLLAVA_CACHE`, else `~/.cache/qllava`."""
    given = os.environ.get("QLLAVA_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "qllava"


class InputError(Exception):
    """What the user gave cannot be used.

    The message is one sentence that names the file, line or id, says what was expected and what to do. Commands
    print it without a stack trace and end with status 1.
    """


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
        metadata={"help": "How a picture becomes a square: pad it, or crop its centre.", "choices": ["pad", "crop"]},
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
            "help": "What is learned from: a file, or in a YAML a list of {path, repeat or weight, image_folder}. nano "
            "has its own."
        },
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Held-out rows, for loss and exact match during the run."}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Where the pictures lie; without it they lie beside the file that names them."}
    )
    pretrain_file: str | None = field(
        default=None, metadata={"help": "Captions for an alignment of the projector before finetune_lora's own stage."}
    )
    too_long: str = field(
        default="error",
        metadata={"help": "What to do with a sample longer than max_length.", "choices": ["error", "drop", "trim"]},
    )
    skip_check: bool = field(
        default=False, metadata={"help": "Do not look at the pictures before the run, and compare no rows."}
    )
