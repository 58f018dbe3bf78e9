"""Model cards: the README.md of a run's adapter, and of a merged model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qllava.config import NANO, InputError, expanded
from qllava.models.hub import settings_folder
from qllava.models.recommended import recommendation
from qllava.models.record import Recipe
from qllava.runs import DATA_FILE, RESULTS_FILE, Run

GENERATION_FILE = "generation_config.json"
_TOLD = (
    "model_name_or_path", "lora_r", "lora_alpha", "lora_dropout", "learning_rate", "projector_lr", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "load_in_4bit",
    "vision_feature_layer", "image_aspect", "seed",
)  # fmt: skip


def base_of(record: Recipe) -> str:
    """Describe the base of a run."""
    if record.model:
        return public_name(record.model)
    return f"{public_name(record.language_model)} with the tower {public_name(record.vision_tower)}"


def public_name(part: str | None) -> str:
    """Return a part's hub name, or only the last component of its path, so that local paths are not published."""
    path = Path(expanded(str(part)))
    return path.resolve().name if path.is_absolute() or path.is_dir() else str(part)


def results_of(run: Path) -> dict[str, Any]:
    """Return the results of a run; empty if it has none."""
    path = run / RESULTS_FILE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def write_card(
    folder: Path,
    run: Path,
    record: Recipe,
    library: str,
    told: Sequence[str],
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write `README.md`: description, base, hashes of the data, settings, evaluation and a note on licences.

    Args:
        folder: Folder for the card.
        run: The run, or one of its checkpoints.
        record: Record of the base.
        library: The hub's name of the library that loads the model.
        told: Further paragraphs.
        results: Results of the run, if its folder does not contain them yet.
    """
    base = record.model or ""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    named = [f"base_model: {base}"] if on_hub else []
    run_folder = run if Run(run).settings.is_file() else run.parent
    lines = [
        "---", f"library_name: {library}", "pipeline_tag: image-text-to-text", *named, "tags: [llava, qllava]", "---",
        "", f"# {run.name if run == run_folder else f'{run_folder.name}, {run.name}'}", "",
    ]  # fmt: skip
    for paragraph in told:
        lines += [paragraph, ""]
    lines += [f"Base: {base_of(record)} (identity {record.fingerprint}); template {record.template}.", ""]
    if said := _recommends(folder, record):
        lines += [
            f"Recommended sampling of the base model: {said}. qllava uses it only with `--sampling recommended`.",
            "",
        ]
    lines += _facts(run_folder)
    if results := results or results_of(run):
        lines += ["Results:", "", "```json", json.dumps(results, indent=2), "```", ""]
    lines += ["The licences of the base model and of the data apply.", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _recommends(folder: Path, record: Recipe) -> str:
    """Return the sampling values of `generation_config.json`, of a merged model or of a run's base."""
    try:
        base = str(record.model or record.language_model)
        if not (folder / GENERATION_FILE).is_file() and base != NANO:
            folder = settings_folder(base)
        found = json.loads((folder / GENERATION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, InputError):  # most models have none, and the base may have moved
        return ""
    return recommendation(found) if isinstance(found, dict) else ""


def _facts(run: Path) -> list[str]:
    """Return data and settings of a run as Markdown; omit what its folder does not hold."""
    lines = []
    if (run / DATA_FILE).is_file():
        data = json.loads((run / DATA_FILE).read_text(encoding="utf-8"))
        lines += ["Data (SHA-256):", "", *(f"- `{file['file']}` {file['sha256']}" for file in data), ""]
    if Run(run).settings.is_file():
        settings = Run(run).read_settings()
        if settings.get("model_name_or_path") is not None:
            settings["model_name_or_path"] = public_name(settings["model_name_or_path"])
        said = [f"- {name}: {settings[name]}" for name in _TOLD if settings.get(name) is not None]
        lines += ["Settings:", "", *said, ""]
    return lines
