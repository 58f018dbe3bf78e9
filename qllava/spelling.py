"""Suggestions for mistyped names: the option, file or model that was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

# Names from other toolkits and common habits, each with qllava's names: the first that the command has is suggested.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "model": ("model_name_or_path", "language_model"),
    "model_name": ("model_name_or_path",),
    "model_path": ("model_name_or_path",),
    "pretrained_model_name_or_path": ("model_name_or_path",),
    "llm": ("language_model",),
    "tower": ("vision_tower",),
    "vision_model": ("vision_tower",),
    "mm_projector_type": ("projector_type",),
    "pretrain_mm_mlp_adapter": ("projector",),
    "mm_projector_lr": ("projector_lr",),
    "mm_vision_select_layer": ("vision_feature_layer",),
    "image_aspect_ratio": ("image_aspect",),
    "conv_mode": ("template",),
    "version": ("template",),
    "chat_template": ("template",),
    "prompt_template": ("template",),
    "rank": ("lora_r",),
    "r": ("lora_r",),
    "lora_rank": ("lora_r",),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "bits": ("load_in_4bit",),
    "quantization_bit": ("load_in_4bit",),
    "qlora": ("load_in_4bit",),
    "4bit": ("load_in_4bit",),
    "data": ("train_file",),
    "data_path": ("train_file", "data"),
    "data_file": ("train_file", "data"),
    "dataset": ("train_file",),
    "dataset_name": ("train_file",),
    "datasets": ("train_file",),
    "train_data": ("train_file",),
    "train_dataset": ("train_file",),
    "eval_data": ("eval_file",),
    "eval_dataset": ("eval_file",),
    "validation_file": ("eval_file",),
    "val_file": ("eval_file",),
    "test_file": ("eval_file",),
    "image_dir": ("image_folder",),
    "image_root": ("image_folder",),
    "images": ("image_folder", "image"),
    "media_dir": ("image_folder",),
    "output": ("output_dir", "out"),
    "out": ("output_dir",),
    "out_dir": ("output_dir", "out"),
    "output_path": ("output_dir", "out"),
    "save_dir": ("output_dir", "out"),
    "epochs": ("num_train_epochs",),
    "num_epochs": ("num_train_epochs",),
    "n_epochs": ("num_train_epochs",),
    "steps": ("max_steps",),
    "batch_size": ("per_device_train_batch_size",),
    "micro_batch_size": ("per_device_train_batch_size",),
    "train_batch_size": ("per_device_train_batch_size",),
    "per_device_batch_size": ("per_device_train_batch_size",),
    "per_gpu_train_batch_size": ("per_device_train_batch_size",),
    "eval_batch_size": ("per_device_eval_batch_size",),
    "grad_accum": ("gradient_accumulation_steps",),
    "grad_acc_steps": ("gradient_accumulation_steps",),
    "accumulation_steps": ("gradient_accumulation_steps",),
    "lr": ("learning_rate",),
    "lr_scheduler": ("lr_scheduler_type",),
    "scheduler": ("lr_scheduler_type",),
    "warmup_ratio": ("warmup_steps",),
    "optimizer": ("optim",),
    "wd": ("weight_decay",),
    "max_seq_length": ("max_length",),
    "max_seq_len": ("max_length",),
    "model_max_length": ("max_length",),
    "cutoff_len": ("max_length",),
    "sequence_len": ("max_length",),
    "truncation": ("too_long",),
    "evaluation_strategy": ("eval_strategy",),
    "overwrite": ("overwrite_output_dir",),
    "gpu_memory": ("fit_memory", "fit"),
    "grad_checkpointing": ("gradient_checkpointing",),
    "question": ("prompt",),
    "max_tokens": ("max_new_tokens", "max_tokens_total"),
    "temp": ("temperature",),
}


def meant(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant by an unknown one; None if none is similar.

    Args:
        word: The name as it was typed, without leading hyphens.
        known: All possible names, with `_` or `-` between words.
    """
    names: dict[str, str] = {}
    for name in known:
        names.setdefault(name.replace("-", "_"), name)  # of two spellings, the one that the help shows first
    word = word.replace("-", "_").lower()
    if word in names:
        return names[word]
    for name in ALIASES.get(word, ()):
        if name in names:
            return names[name]
    parts = set(word.split("_"))

    def score(name: str) -> float:
        """Return how similar two names are, by letters and by whole words, which people remember."""
        other = set(name.split("_"))
        shared = len(parts & other) / len(parts | other)
        return difflib.SequenceMatcher(None, word, name).ratio() + shared

    best = max(names, key=score, default=None)
    return names[best] if best is not None and score(best) >= 0.75 else None


def suggestion(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return the end of a message about an unknown name; `prefix` is `--` for a flag."""
    name = meant(word, known)
    return f"; did you mean {prefix}{name}?" if name else "; see --help for all names."


def close_to(word: str, names: Iterable[str]) -> str | None:
    """Return the name whose spelling is most similar to a word; None if none is similar.

    Names with different digits are different things (`llava-7b` and `llava-13b`), not typing errors.
    """
    digits = re.findall(r"\d+", word)
    same = {name.lower(): name for name in names if re.findall(r"\d+", name) == digits}
    found = difflib.get_close_matches(word.lower(), same, n=1, cutoff=0.75)
    return same[found[0]] if found else None


def neighbour(path: Path, *, folders: bool = False) -> Path | None:
    """Return the path with the most similar name next to a missing path; None if none is similar.

    Args:
        path: The path as it was typed.
        folders: Whether to search only folders.
    """
    try:
        found = [one for one in path.parent.iterdir() if not one.name.startswith(".") and (one.is_dir() or not folders)]
    except OSError:  # the parent folder is missing too, or cannot be read
        return None
    # A common suffix does not make two names similar.
    stems = {one.stem: one.name for one in found if one.suffix == path.suffix}
    stem = close_to(path.stem, stems)
    other_ending = next((one.name for one in sorted(found) if one.stem == path.stem), None)
    name = stems[stem] if stem else other_ending
    return path.parent / name if name else None
