"""Sampling values that a model recommends: read from its `generation_config`, shown, and used only on request.

transformers' `generate` applies everything in a model's `generation_config`, even a repetition penalty for greedy
answers. Here these values are data: `inference` decodes as the user asked, and only `--sampling recommended` uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_UNUSED = (
    "bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "guidance_scale", "min_length", "min_new_tokens", "num_beams", "penalty_alpha", "sequence_bias", "suppress_tokens",
    "top_h",
)  # fmt: skip
_NEUTRAL: tuple[Any, ...] = (None, 0, 1, [], {})


@dataclass(frozen=True)
class Decoding:
    """Choice of the next token. The defaults are greedy; `temperature=1` alone samples from the softmax."""

    temperature: float = 0.0
    """Temperature; 0 for greedy."""
    top_k: int = 0
    """Sample from this many of the most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the most likely one's probability."""
    typical_p: float = 1.0
    """Sample from the tokens whose information content is closest to the expected one, up to this probability."""
    repetition_penalty: float = 1.0
    """Penalty on the logit of a token that has already appeared."""
    no_repeat_ngram_size: int = 0
    """Length of token sequences that must not repeat; 0 for no rule."""

    def __str__(self) -> str:
        """Return the fields that are not neutral, by name."""
        said = [(field, getattr(self, field.name)) for field in fields(self)]
        return ", ".join(f"{field.name} {value:g}" for field, value in said if value != field.default)


def recommended(generation: Any) -> Decoding:
    """Return the decoding that a model recommends.

    Args:
        generation: Its `generation_config`, as an object or as the dictionary of its file.

    Returns:
        Only values with an effect: temperature or top-p of a model that recommends no sampling are left out.
    """
    found = _values(generation)
    names = [own.name for own in fields(Decoding) if found.get("do_sample") or own.name not in _DRAWING]
    said = {name: found[name] for name in names if _is_number(found.get(name))}
    if found.get("do_sample"):
        said.setdefault("temperature", 1.0)
    return Decoding(**said)


def recommendation(generation: Any) -> str:
    """Return `recommended` as text, and other values of a `generation_config`, which are never used; "" for none."""
    found = _values(generation)
    unused = [name for name in _UNUSED if found.get(name) not in _NEUTRAL]
    used = str(recommended(generation))
    return "; ".join([*([used] if used else []), *([f"{', '.join(unused)} (never used)"] if unused else [])])


def _values(generation: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = generation if isinstance(generation, Mapping) else generation.to_dict()
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
