"""Number of positions of a language model, including its rope scaling."""

from __future__ import annotations

from typing import Any

# Scalings whose factor is not included in max_position_embeddings. With the others (llama3, longrope) it is.
_MULTIPLIED = ("linear", "dynamic", "yarn")


def positions_of(text: Any) -> int:
    """Return the maximum length of a sequence for a language model, in tokens.

    `linear`, `dynamic` and `yarn` multiply the positions by their factor: `original_max_position_embeddings` if the
    config has it (max_position_embeddings may then be the product already), else max_position_embeddings. With
    `llama3` and `longrope`, max_position_embeddings is the product. transformers' own configs follow these rules, and
    vLLM reads them so.

    Args:
        text: Config of a language model.
    """
    most = int(text.max_position_embeddings)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") not in _MULTIPLIED:
        return most
    factor = float(rope.get("factor") or 1)
    original = rope.get("original_max_position_embeddings")
    return max(most, int(int(original) * factor)) if original else int(most * factor)
