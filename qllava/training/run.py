"""A run: one command, one folder. Both recipes are thin calls of `pretrain` and `finetune`.

    parts ----> assemble ----> [stage 1: captions, projector] ----> [stage 2: conversations, projector + LoRA] ----> table, report

A stage is a set of values (`Stage`), not a code path: `train_stage` trains both. The same command again continues an unfinished
run at its newest checkpoint; a finished one is refused.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed

from qllava.config import NANO, InputError
from qllava.conversation import PLAIN, TEMPLATES, Template
from qllava.data.collate import Collator
from qllava.data.encode import Encoder, Sample
from qllava.data.formats import Example, read_examples
from qllava.models import assemble as parts
from qllava.models import ledger
from qllava.models.checkpoint import tokens_per_image
from qllava.nano import dataset as nano
from qllava.training import scores
from qllava.training.report import write_report
from qllava.training.settings import Settings, TrainConfig
from qllava.training.trainer import LlavaTrainer, Metrics, checkpoints, to_dataset

RESULTS_FILE = "results.json"
PROBES_FILE = "probes.safetensors"
PROBES = 32


@dataclass(frozen=True)
class Stage:
    """What distinguishes one stage from the other."""

    name: str
    """`pretrain` or `finetune`, as it stands in metrics.jsonl."""
    title: str
    """For people."""
    template: Template
    """How its rows are written."""
    train: list[Example]
    """Its rows."""
    evaluation: list[Example]
    """Held-out rows."""
    folder: Path
    """Where it is written."""
    config: TrainConfig
    """The loop's settings."""


class Progress(TrainerCallback):  # type: ignore[misc]
    """A bar of steps with the loss, and what is left."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the bar."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit=" steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Show the numbers that people look at."""
        shown = {"loss": "loss", "eval_loss": "held-out loss", "eval_exact_match": "exact match"}
        found = {label: f"{logs[key]:.3f}" for key, label in shown.items() if logs and key in logs}
        if found and self.bar is not None:
            self.bar.set_postfix(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the bar where it is."""
        self.bar.close()


def pretrain(settings: Settings) -> Path:
    """Stage 1 alone: the projector learns from captions. Returns the run's folder."""
    folder = _open_folder(settings)
    started = time.monotonic()
    assembled = _assemble(settings)
    train = _read(settings.data.train_file, settings, "train_file", nano_file="pretrain")
    evaluation = read_examples(Path(settings.data.eval_file), _images(settings)) if settings.data.eval_file else []
    template = TEMPLATES[settings.model.template] if settings.model.template else PLAIN
    stage = Stage("pretrain", "Stage 1", template, train, evaluation, folder, _with_rate(settings.train, 1e-3))
    trained = train_stage(stage, parts.train_projector_only(assembled), assembled, settings)
    _finish(folder, {"seconds": round(time.monotonic() - started, 1), **trained})
    _say_next(
        f"Stage 1 is done: {folder}",
        [f"python recipes/finetune_lora.py --projector {folder} ...   tune on your conversations", f"open {folder / 'report.html'}"],
    )
    return folder


def finetune(settings: Settings) -> Path:
    """Both stages, or the second alone where a projector is given. Returns the run's folder."""
    model_, data = settings.model, settings.data
    if (model_.language_model or model_.vision_tower) and not (model_.projector or data.pretrain_file):
        raise InputError(
            "A new LLaVA's projector has learned nothing yet: give projector (the folder that pretrain_projector wrote) or pretrain_file."
        )
    folder = _open_folder(settings)
    started = time.monotonic()
    assembled = _assemble(settings)
    table = scores.Table.open(folder, assembled) if settings.model.is_nano and not settings.data.train_file else None
    train = _read(settings.data.train_file, settings, "train_file", nano_file="train")
    evaluation = _read_evaluation(settings)
    shown = scores.spaced(evaluation, 12)
    before = scores.answers(assembled.model, assembled, shown) if shown else []
    if table:
        table.measure("untrained", assembled.model)
    _align(settings, assembled, folder)
    if table:
        table.measure("stage1", assembled.model)
    model = parts.add_lora(
        assembled, r=settings.model.lora_r, alpha=settings.model.lora_alpha, dropout=settings.model.lora_dropout
    )
    config = _with_rate(settings.train, 2e-4)
    config.projector_lr = 2e-5 if config.projector_lr is None else config.projector_lr
    stage = Stage("finetune", "Stage 2", assembled.template, train, evaluation, folder, config)
    trained = train_stage(stage, model, assembled, settings)
    after = scores.answers(model, assembled, shown) if shown else []
    scores.write_samples(folder / "samples.json", shown, before, after)
    measured = table.finish(model, train) if table else {}
    _finish(folder, {**measured, "seconds": round(time.monotonic() - started, 1), **trained})
    if table:
        print("\n" + scores.format_table(measured))
    picture = shown[0].images[0] if shown and shown[0].images else "photo.jpg"
    _say_next(
        f"The run is done: {folder} (open {folder / 'report.html'} in a browser)",
        [
            f'qllava chat {folder} --image {picture} --prompt "{scores.asked(shown[0]) if shown else "What is this?"}"',
            f"qllava merge {folder} {folder}-merged",
            f"python demo/app.py --model {folder}",
        ],
    )
    return folder


def train_stage(stage: Stage, model: nn.Module, assembled: parts.Assembled, settings: Settings) -> dict[str, float]:
    """Train one stage into its folder, from its newest checkpoint if there is one; returns the last held-out figures."""
    encoder = Encoder(
        assembled.processor.tokenizer,
        stage.template,
        assembled.model.config.image_token_index,
        tokens_per_image(assembled.model.config),
        stage.config.max_length or 1 << 30,
        settings.data.too_long,  # type: ignore[arg-type]
    )
    encoded = encoder.encode_all(stage.train, progress=True)
    held_out = encoder.encode_all(stage.evaluation).samples if stage.evaluation else []
    questions = scores.spaced(stage.evaluation, stage.config.eval_questions)
    trainer = LlavaTrainer(
        model,
        assembled,
        stage.config,
        train=to_dataset(encoded.samples),
        evaluation=to_dataset(held_out) if held_out else None,
        exact_match=_exact_match(model, assembled, questions) if questions and stage.template is not PLAIN else None,
        callbacks=[Metrics(stage.folder / "metrics.jsonl", stage.name), Progress(stage.title)],
    )
    trainer.remove_callback(PrinterCallback)
    ledger.check(model)
    text = _ledger_text(model, stage, encoded.samples, encoded.dropped, encoded.trimmed)
    print(f"\n{text}\n")
    (stage.folder / "ledger.txt").write_text(text + "\n", encoding="utf-8")
    newest = checkpoints(stage.folder)
    if newest:
        print(f"Continuing from {newest[-1]}.")
    if stage.config.gradient_checkpointing:
        model.train()
    trainer.train(resume_from_checkpoint=str(newest[-1]) if newest else None)
    model.eval()
    last = trainer.evaluate() if held_out else {}
    trainer.save_model(str(stage.folder))
    save_probes(stage.folder / PROBES_FILE, held_out or encoded.samples, trainer.data_collator)
    return {key: value for key, value in last.items() if key in ("eval_loss", "eval_exact_match")}


def save_probes(path: Path, samples: Sequence[Sample], collator: Collator) -> None:
    """Keep rows as the model gets them, evenly spaced: `qllava merge` compares what it wrote on them."""
    tensors: dict[str, torch.Tensor] = {}
    for number, row in enumerate(to_dataset(scores.spaced(samples, PROBES))):
        batch = collator([row])
        for key in ("input_ids", "labels"):
            tensors[f"{number}.{key}"] = batch[key][0]
        if "pixel_values" in batch:
            tensors[f"{number}.pixel_values"] = batch["pixel_values"]
    save_file(tensors, path)


def _exact_match(model: nn.Module, assembled: parts.Assembled, questions: list[Example]) -> Callable[[], float]:
    return lambda: scores.exact_match(model, assembled, questions)


def _ledger_text(
    model: nn.Module, stage: Stage, samples: Sequence[Sample], dropped: Sequence[str], trimmed: Sequence[str]
) -> str:
    """The ledger of the model, and what the data comes to."""
    config = stage.config
    rates = {"LoRA": config.learning_rate or 0.0, "projector": config.learning_rate or 0.0}
    if config.projector_lr is not None and stage.name == "finetune":
        rates["projector"] = config.projector_lr
    lengths = sorted(len(s.input_ids) for s in samples)
    learned = sum(label != -100 for s in samples for label in s.labels)
    if not lengths:
        raise InputError(f"No sample is left to train on: all {len(dropped)} are longer than max_length; raise it.")
    lines = [
        stage.title,
        ledger.format_ledger(ledger.ledger(model), rates),
        f"samples {len(samples):,} (dropped {len(dropped)}, trimmed {len(trimmed)}); template {stage.template.name}; "
        f"tokens median {lengths[len(lengths) // 2]}, most {lengths[-1]}; learned {learned:,} of {sum(lengths):,}",
    ]
    return "\n".join(lines)


def _align(settings: Settings, assembled: parts.Assembled, folder: Path) -> None:
    """Give the projector its start: a folder's, or a stage 1 of its own; a LLaVA that exists already has one."""
    if settings.model.projector:
        parts.load_projector(assembled.model, Path(settings.model.projector))
        return
    if assembled.recipe.model is not None and not settings.data.pretrain_file:
        return
    stage1 = folder / "stage1"
    if (stage1 / RESULTS_FILE).is_file():
        parts.load_projector(assembled.model, stage1)
        return
    started = time.monotonic()
    stage1.mkdir(exist_ok=True)
    train = _read(settings.data.pretrain_file, settings, "pretrain_file", nano_file="pretrain")
    config = copy.copy(settings.train)
    config.output_dir = str(stage1)
    config.learning_rate, config.eval_strategy = 1e-3, "no"  # type: ignore[assignment]
    if settings.model.is_nano:
        for name, value in NANO_PRETRAIN.items():
            setattr(config, name, value)
    stage = Stage("pretrain", "Stage 1", PLAIN, train, [], stage1, config)
    train_stage(stage, parts.train_projector_only(assembled), assembled, settings)
    assembled.model.requires_grad_(False)
    _finish(stage1, {"seconds": round(time.monotonic() - started, 1)})
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write((stage1 / "metrics.jsonl").read_text(encoding="utf-8"))


# What nano needs, found by trying: it is a thousandth of a 7B and learns at higher rates, without recomputation.
NANO_PRETRAIN: dict[str, Any] = {
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 32,
    "num_train_epochs": 1.0,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_strategy": "no",
}
NANO_FINETUNE: dict[str, Any] = {
    "learning_rate": 2e-3,
    "projector_lr": 1e-3,
    "per_device_train_batch_size": 24,
    "num_train_epochs": 1.0,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "save_steps": 200,
    "save_total_limit": 2,
}


def _assemble(settings: Settings) -> parts.Assembled:
    """The model of the settings. Raises InputError when they contradict each other."""
    model = settings.model
    built = bool(model.language_model or model.vision_tower)
    if model.model_name_or_path and built:
        raise InputError("Give either model_name_or_path, or language_model with vision_tower; not both.")
    set_seed(settings.train.seed)
    # `plain` is for captions; the model itself keeps the template in which it will be asked.
    template = model.template if model.template != "plain" else None
    if model.is_nano:
        recipe = parts.nano_recipe(template or "chatml", load_in_4bit=model.load_in_4bit)
    else:
        recipe = parts.Recipe(
            model=None if built else model.model_name_or_path,
            language_model=model.language_model,
            vision_tower=model.vision_tower,
            projector_type=model.projector_type,  # type: ignore[arg-type]
            vision_feature_layer=model.vision_feature_layer,
            image_aspect=model.image_aspect,  # type: ignore[arg-type]
            template=template or "",
            load_in_4bit=model.load_in_4bit,
        )
    return parts.assemble(recipe, seed=settings.train.seed)


def _open_folder(settings: Settings) -> Path:
    """Make or reopen the run's folder and write `run.yaml`. Raises InputError for a finished run."""
    folder = Path(str(settings.train.output_dir))
    if (folder / RESULTS_FILE).is_file() and not settings.train.overwrite_output_dir:
        raise InputError(f"{folder} holds a finished run; choose another output_dir, or set overwrite_output_dir.")
    try:
        if settings.train.overwrite_output_dir and (folder / "run.yaml").is_file():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if settings.model.is_nano:
            settings.model.model_name_or_path = NANO
        resolved = {**asdict(settings.model), **asdict(settings.data), **settings.train.to_dict()}
        (folder / "run.yaml").write_text(yaml.safe_dump(_plain(resolved), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise InputError(f"The run cannot be written to {folder}: {error.strerror or error}.") from error
    return folder


def _plain(value: Any) -> Any:
    """The same value in types that every YAML reader knows."""
    return json.loads(json.dumps(value, default=str))


def _with_rate(config: TrainConfig, rate: float) -> TrainConfig:
    """The settings with the stage's own learning rate where none was given."""
    config = copy.copy(config)
    config.learning_rate = rate if config.learning_rate is None else config.learning_rate
    return config


def _images(settings: Settings) -> Path | None:
    return Path(settings.data.image_folder) if settings.data.image_folder else None


def _read(given: str | None, settings: Settings, field: str, *, nano_file: str) -> list[Example]:
    """The rows of a file, or of nano's own where none is given and the parts are nano's."""
    if given is None:
        if not settings.model.is_nano:
            raise InputError(f"The setting {field} is missing: give a file of rows (nano alone brings its own).")
        data = nano.prepare()
        return read_examples(getattr(data, nano_file), data.folder)
    return read_examples(Path(given), _images(settings))


def _read_evaluation(settings: Settings) -> list[Example]:
    if settings.data.eval_file:
        return read_examples(Path(settings.data.eval_file), _images(settings))
    if settings.model.is_nano and not settings.data.train_file:
        data = nano.prepare()
        return read_examples(data.validation, data.folder)
    return []


def _finish(folder: Path, results: dict[str, Any]) -> None:
    """Write results and report; `results.json` comes last, because it marks the run as finished."""
    aside = folder / f".{RESULTS_FILE}"
    aside.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    aside.rename(folder / RESULTS_FILE)
    write_report(folder)


def _say_next(done: str, commands: list[str]) -> None:
    print(f"\n{done}\nNext:")
    for command in commands:
        print(f"  {command}")


def main(run: Callable[[Settings], Path], settings: Callable[[], Settings]) -> int:
    """Run a recipe: errors that a user can mend are one sentence on stderr and status 1."""
    try:
        run(settings())
    except InputError as error:
        print(f"qllava: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"qllava: {error.filename or 'a file'} cannot be written or read: {error.strerror or error}.", file=sys.stderr)
        return 1
    return 0
