"""Tiny runs: settings of a recipe, a trainer, and whole runs with the tiny model's parts, a second or two each."""

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
    """The parts and data of tiny runs, and two finished runs; nothing may be changed in these folders."""

    language_model: Path
    """Folder of the language model."""
    tower: Path
    """Folder of the vision tower."""
    rows: Path
    """Data file of the examples."""
    stage1: Path
    """Finished run of stage 1."""
    stage2: Path
    """Finished run of stage 2."""

    def recipe(self, **changes: Any) -> Recipe:
        """Return the parts in the form that `assemble` takes."""
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
    """Return the command line of a recipe with the tiny parts: four steps of two examples, two checkpoints."""
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
    """Return the settings of the command line that `flags` returns."""
    return parse(flags(tiny, **fields), output_dir=str(folder), nano={})


def stage1_settings(tiny: Tiny, folder: Path, **fields: Any) -> Settings:
    """Return the settings of stage 1 in the fixture `tiny`, with changes."""
    return settings(tiny, folder, **fields)


def stage2_settings(tiny: Tiny, folder: Path, **fields: Any) -> Settings:
    """Return the settings of stage 2 in the fixture `tiny` (with held-out examples), with changes."""
    values = {"projector": tiny.stage1, "eval_file": tiny.rows, "eval_strategy": "steps", "eval_steps": 2, **fields}
    return settings(tiny, folder, **values)


def make_tiny_runs(folder: Path) -> Tiny:
    """Write parts and examples, and train both stages."""
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
    """Return the trainer of one stage before its first step; it trains, and evaluates if set, on the tiny examples."""
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
    """Return the encoded examples of a data file, ready to be trained on."""
    config = assembled.model.config
    encoder = Encoder(
        assembled.processor.tokenizer, assembled.template, config.image_token_index, ImageLayout.of_config(config)
    )
    return prepare([Part(rows, None)], encoder, seed=0)[0]


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of a model's whole state, with packed weights and their scales."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    """Return the names of tensors that have changed in any bit."""
    after = model.state_dict()
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def refusal(error: InputError) -> str:
    """Return the message of an error, after a check that it is one line that ends like a sentence."""
    text = str(error)
    assert text and "\n" not in text and text.endswith((".", "?")), text
    return text


def write_records(path: Path, rows: list[Any]) -> Path:
    """Write examples to a data file, and return its path."""
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def run_merge(folder: Path, out: Path, **changes: Any) -> MergeResult:
    """Merge a run with the defaults of the tests: NF4 base, fp32, with verification."""
    values: dict[str, Any] = {"base": "nf4", "dtype": "float32", "max_shard_size": "5GB", "verify": True, **changes}
    return merge(folder, out, **values)
