"""Tiny runs: the settings of a recipe, a trainer and whole runs over the tiny model's parts, a second or two each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qllava.config import InputError
from qllava.data.encode import Encoder
from qllava.image_layout import ImageLayout
from qllava.merge import MergeResult, merge
from qllava.models.adapter import add_lora, train_projector_only
from qllava.models.assemble import Assembled, assemble
from qllava.models.lora import Lora
from qllava.models.outline import Recipe
from qllava.training.data import Part, Prepared, prepare
from qllava.training.run import finetune, pretrain
from qllava.training.settings import Settings, parse
from qllava.training.stages import ALIGNMENT, INSTRUCTION, Stage
from qllava.training.trainer import LlavaTrainer
from tests.tiny_models import make_tiny_parts, make_tiny_records


@dataclass(frozen=True)
class Tiny:
    """What tiny runs are made from, and two that have finished; nothing may be changed in these folders."""

    language_model: Path
    tower: Path
    rows: Path
    stage1: Path
    stage2: Path

    def recipe(self, **changes: Any) -> Recipe:
        """The parts as `assemble` takes them."""
        values = {
            "model": None,
            "language_model": str(self.language_model),
            "vision_tower": str(self.tower),
            "projector_type": "mlp2x_gelu",
            "vision_feature_layer": -2,
            "image_aspect": "pad",
            "template": "chatml",
            "load_in_4bit": True,
        }
        return Recipe(**{**values, **changes})


def flags(tiny: Tiny, **fields: Any) -> list[str]:
    """The command line of a recipe over the tiny parts: four steps of two examples, a checkpoint after the second."""
    values: dict[str, Any] = {
        "language_model": tiny.language_model,
        "vision_tower": tiny.tower,
        "train_file": tiny.rows,
        "template": "chatml",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,  # so that the random state matters
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "warmup_steps": 0,
        **fields,
    }
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def settings(tiny: Tiny, folder: Path, **fields: Any) -> Settings:
    """The settings of that command line."""
    return parse(flags(tiny, **fields), output_dir=str(folder), nano={})


def stage1_settings(tiny: Tiny, folder: Path, **fields: Any) -> Settings:
    """Stage 1, as the fixture ran it."""
    return settings(tiny, folder, **fields)


def stage2_settings(tiny: Tiny, folder: Path, **fields: Any) -> Settings:
    """Stage 2 with held-out examples, as the fixture ran it."""
    values = {"projector": tiny.stage1, "eval_file": tiny.rows, "eval_strategy": "steps", "eval_steps": 2, **fields}
    return settings(tiny, folder, **values)


def make_tiny_runs(folder: Path) -> Tiny:
    """Parts, examples and both stages."""
    language_model, tower = make_tiny_parts(folder)
    tiny = Tiny(language_model, tower, make_tiny_records(folder), folder / "stage1", folder / "stage2")
    pretrain(stage1_settings(tiny, tiny.stage1))
    finetune(stage2_settings(tiny, tiny.stage2))
    return tiny


def make_trainer(
    tiny: Tiny,
    folder: Path,
    *,
    lora: bool = True,
    recipe: Recipe | None = None,
    callbacks: list[TrainerCallback] | None = None,
    kept: dict[str, Any] | None = None,
    **fields: Any,
) -> LlavaTrainer:
    """The trainer of one stage over the tiny examples, before its first step; it evaluates on them too, if asked."""
    values = {"learning_rate": 2e-4, "projector_lr": 2e-5, "lora_dropout": 0, "save_strategy": "no", **fields}
    chosen = settings(tiny, folder, **values)
    assembled = assemble(recipe or tiny.recipe())
    torch.manual_seed(0)
    model = add_lora(assembled, Lora(4, 8, chosen.model.lora_dropout)) if lora else train_projector_only(assembled)
    rows = encode(assembled, tiny.rows)
    held_out = rows if chosen.train.eval_strategy != "no" else None
    kind = INSTRUCTION if lora else ALIGNMENT
    stage = Stage(kind, assembled.template, rows, held_out, [], folder, chosen.train, {})
    return LlavaTrainer(model, assembled, stage, callbacks=callbacks or [], kept=kept or {})


def encode(assembled: Assembled, rows: Path) -> Prepared:
    """The examples, ready to be trained on."""
    config = assembled.model.config
    encoder = Encoder(
        assembled.processor.tokenizer, assembled.template, config.image_token_index, ImageLayout.of_config(config)
    )
    return prepare([Part(rows, None)], encoder, seed=0)[0]


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything in a model's state, the packed weights and their scales too."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    """Names of what is no longer bit for bit what it was."""
    after = model.state_dict()
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def refusal(error: InputError) -> str:
    """The message of an error, which has to be one sentence in one line."""
    text = str(error)
    assert text and "\n" not in text and text.endswith((".", "?")), text
    return text


def write_records(path: Path, rows: list[Any]) -> Path:
    """Write a data file."""
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def run_merge(folder: Path, out: Path, **changes: Any) -> MergeResult:
    """Merge a run with the defaults of the tests: NF4 base, fp32, verified."""
    values: dict[str, Any] = {"base": "nf4", "dtype": "float32", "max_shard_size": "5GB", "verify": True, **changes}
    return merge(folder, out, **values)
