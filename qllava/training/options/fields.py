"""All settings by name, joined from `table.py` and the dataclasses of `qllava.config`, with the bounds of numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from qllava.config import DataConfig, LoopConfig, ModelConfig
from qllava.training.options.table import OURS, TRL, Field, Kind

PATHS = frozenset(
    (
        *("model_name_or_path", "language_model", "vision_tower", "projector", "train_file", "eval_file"),
        *("pretrain_file", "image_folder", "output_dir", "deepspeed", "base_model"),
    )
)
"""Settings that hold, or may hold, a path; `~` is expanded in them."""

LISTS = frozenset(("train_file", "eval_file", "pretrain_file", "report_to", "debug"))
"""Text settings that a YAML may also give as a list."""

# Minimum and maximum of a number (None: no bound), and a reason why a number just outside is refused.
_NOTHING = "; nothing would be trained"
_AT_LEAST_1 = (1, None, "")
_AT_LEAST_0 = (0, None, "")
_ABOVE_0 = (5e-324, None, "")  # the smallest number above 0
_SHARE = (0, 1 - 2**-53, "")  # below 1
RANGES: Mapping[str, tuple[float | None, float | None, str]] = {
    "num_train_epochs": (5e-324, None, _NOTHING),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _AT_LEAST_1),
    **dict.fromkeys(("gradient_accumulation_steps", "max_length", "tokens_per_pack", "save_total_limit"), _AT_LEAST_1),
    **dict.fromkeys(("torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_timeout"), _AT_LEAST_1),
    **dict.fromkeys(("ddp_bucket_cap_mb", "lora_alpha", "dataset_num_proc"), _AT_LEAST_1),
    **dict.fromkeys(("learning_rate", "projector_lr", "weight_decay", "max_grad_norm", "warmup_steps"), _AT_LEAST_0),
    **dict.fromkeys(("eval_delay", "dataloader_num_workers", "recompute_layers", "eval_questions"), _AT_LEAST_0),
    "eval_questions_final": _AT_LEAST_0,
    "lora_r": _AT_LEAST_0,  # `qllava plan` takes 0 for stage 1; stage 2 refuses 0
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "adam_epsilon"), _ABOVE_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), _SHARE),
    "seed": (0, 2**32 - 1, ""),
}


def of_config(config: type) -> tuple[Field, ...]:
    """Return the fields of one dataclass of `qllava.config`."""
    hints = get_type_hints(config)
    fields = []
    for own in dataclasses.fields(config):
        choices = tuple(own.metadata.get("choices", ()))
        kind = "choice" if choices else _kind(hints[own.name])
        # A field that is missing in `OURS` fails a test; until it is added, a resumed run must not change it.
        use = OURS.get(own.name, "decides")
        fields.append(Field(own.name, kind, own.default, use, choices=choices, help=own.metadata.get("help", "")))
    return tuple(fields)


def _kind(hint: Any) -> Kind:
    """Return the kind of a type annotation such as `int` or `float | None`."""
    some = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    (plain,) = (one for one in some if one is not type(None))
    if get_origin(plain) is list:
        return "list"
    if plain is bool and len(some) == 2:
        return "switch"
    return {int: "int", float: "float", bool: "bool", str: "str"}[plain]  # type: ignore[return-value]


MODEL, DATA, LOOP = of_config(ModelConfig), of_config(DataConfig), of_config(LoopConfig)
_OUR_NAMES = {field.name for field in LOOP}
_OF_TRL = {field.name: field for field in TRL}
# For a field of TRL, TRL defines the type and qllava may define the default.
_LOOP = tuple(
    dataclasses.replace(_OF_TRL[own.name], default=own.default, help=own.help) if own.name in _OF_TRL else own
    for own in LOOP
)
FIELDS: Mapping[str, Field] = {
    field.name: field for field in (*MODEL, *DATA, *_LOOP, *(field for field in TRL if field.name not in _OUR_NAMES))
}
"""Every setting of a recipe."""


def deciding(names: Iterable[str]) -> list[str]:
    """Return the names of settings that decide what a run learns; a resumed run must not change them."""
    return [name for name in names if name not in FIELDS or FIELDS[name].use == "decides"]
