"""What a model recommends for sampling: read from its `generation_config`, shown, and used only when asked for.

transformers' `generate` takes over whatever a model's `generation_config` has, a repetition penalty for greedy answers
too. Here a model's own values are data: `inference` decodes as the user asked, and with `--sampling recommended` by
these.
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
    """How the next token is chosen. The defaults choose the likeliest; `temperature=1` alone draws from the softmax."""

    temperature: float = 0.0
    """0 for the likeliest token."""
    top_k: int = 0
    """Draw among so many of the likeliest; 0 for all."""
    top_p: float = 1.0
    """Draw among the likeliest that together have this probability."""
    min_p: float = 0.0
    """Draw among tokens with at least this share of the likeliest one's probability."""
    typical_p: float = 1.0
    """Draw among the tokens whose surprise is nearest to the expected one, up to this probability."""
    repetition_penalty: float = 1.0
    """By how much a logit is lowered once its token has appeared."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens appears twice; 0 for no rule."""

    def __str__(self) -> str:
        """The fields that are not neutral, by name."""
        said = [(field, getattr(self, field.name)) for field in fields(self)]
        return ", ".join(f"{field.name} {value:g}" for field, value in said if value != field.default)


def recommended(generation: Any) -> Decoding:
    """What a model recommends.

    Args:
        generation: Its `generation_config`, as an object or as the dictionary of its file.

    Returns:
        Only what changes something: a temperature or top-p of a model that recommends no sampling is left out.
    """
    found = _values(generation)
    names = [own.name for own in fields(Decoding) if found.get("do_sample") or own.name not in _DRAWING]
    said = {name: found[name] for name in names if _is_number(found.get(name))}
    if found.get("do_sample"):
        said.setdefault("temperature", 1.0)
    return Decoding(**said)


def recommendation(generation: Any) -> str:
    """`recommended` in words, and what else a `generation_config` asks for, which is never used; empty for nothing."""
    found = _values(generation)
    unused = [name for name in _UNUSED if found.get(name) not in _NEUTRAL]
    used = str(recommended(generation))
    return "; ".join([*([used] if used else []), *([f"{', '.join(unused)} (never used)"] if unused else [])])


def _values(generation: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = generation if isinstance(generation, Mapping) else generation.to_dict()
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
