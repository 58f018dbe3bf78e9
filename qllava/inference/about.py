"""Facts about a loaded model for display: base, adapter, template, scores.

They are read from the model's folder and contain no local paths, so that a public page may show them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qllava.config import expanded
from qllava.image_layout import ImageLayout
from qllava.inference.chat import Chat
from qllava.models.adapter import read_record
from qllava.models.card import base_of, results_of
from qllava.models.positions import positions_of
from qllava.models.recommended import recommendation
from qllava.runs import ADAPTER_CONFIG_FILE, MERGE_FILE, RECORD_FILE, RESULTS_FILE, is_checkpoint

_SCORES = {
    "stage2": "Held-out questions",
    "unseen_pairs": "Unseen pairs",
    "eval_exact_match": "Held-out examples, exact match",
    "eval_loss": "Held-out loss",
}

_DRAWN_SHAPES = "This model knows drawn shapes only: ask about their colours, forms, sizes, places or number."


def label(chat: Chat) -> str:
    """Return a short name: the name of the folder (for a checkpoint, of run and checkpoint) or the hub name."""
    folder = Path(expanded(chat.name))
    if not folder.is_dir():
        return chat.name
    name = folder.resolve().name
    return f"{folder.resolve().parent.name}/{name}" if is_checkpoint(folder.resolve()) else name


def about(chat: Chat) -> dict[str, str]:
    """Return facts by name, in display order; unknown facts are omitted."""
    folder = Path(expanded(chat.name))
    config = chat.model.config
    text, vision, image = config.get_text_config(), config.vision_config, ImageLayout.of_config(config)
    parameters = sum(_elements(parameter) for parameter in chat.model.parameters())
    facts = {
        "Model": label(chat),
        "Size": f"{_short(parameters)} parameters, {text.num_hidden_layers} layers of {text.hidden_size}",
        "Images": f"{vision.image_size} x {vision.image_size} pixels, {image.tokens} tokens each",
        "Context": f"{positions_of(text):,} tokens",
        "Computes in": f"{str(chat.model.dtype).removeprefix('torch.')} on {chat.model.device}",
    }
    said = recommendation(chat.model.generation_config)
    if said:
        facts["Recommended sampling"] = said
    if (folder / RECORD_FILE).is_file():
        record, adapter = read_record(folder), _read(folder / ADAPTER_CONFIG_FILE)
        facts["Base"] = base_of(record) + (", language model in 4 bit" if record.load_in_4bit else "")
        facts["Adapter"] = f"LoRA of rank {adapter.get('r')}, alpha {adapter.get('lora_alpha')}, and the projector"
        facts["Template"] = record.template
        return facts | _scores(results_of(folder))
    merged = _read(folder / MERGE_FILE)
    if merged:
        facts["Base"] = f"{merged.get('base_model')}, with the adapter of {merged.get('run')} merged"
        facts["Template"] = str(merged.get("template"))
    if merged.get("kl_per_token") is not None:
        facts["Merge"] = (
            f"{'verified' if merged.get('verified') else 'differs from the adapter model'}: "
            f"{merged['kl_per_token']:.1e} nats per token from the adapter model"
        )
    return facts | _scores(merged.get("results", {}))


def limits(chat: Chat) -> str:
    """Return a sentence about what a model can be asked; empty unless the model is a run on nano's own examples."""
    folder = Path(expanded(chat.name))
    results = _read(folder / RESULTS_FILE) or _read(folder / MERGE_FILE).get("results")
    # Only nano's own held-out questions are about pairs of colour and form that were never shown.
    return _DRAWN_SHAPES if isinstance(results, dict) and "unseen_pairs" in results else ""


def _scores(results: dict[str, Any]) -> dict[str, str]:
    facts = {}
    for key, name in _SCORES.items():
        value = results.get(key)
        if isinstance(value, int | float):
            facts[name] = f"{value:.3f}" if key == "eval_loss" else f"{100 * value:.1f} % correct"
    return facts


def _elements(parameter: Any) -> int:
    """Return the number of weights in a parameter; bitsandbytes packs two 4-bit weights into a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(parameter.numel())


def _short(number: int) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file gives an empty one, because a card shows what is known."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
