"""How many positions a language model reads, with what its rope scaling adds."""

from __future__ import annotations

from typing import Any

# Scalings whose factor is not in max_position_embeddings yet. With the others (llama3, longrope) it is.
_MULTIPLIED = ("linear", "dynamic", "yarn")


def positions_of(text: Any) -> int:
    """The longest sequence that a language model was made for, in tokens.

    `linear`, `dynamic` and `yarn` stretch the positions by their factor: of `original_max_position_embeddings` where
    the config has it (max_position_embeddings may be the stretched number then), else of max_position_embeddings. With
    `llama3` and `longrope` max_position_embeddings is the stretched number. So do transformers' own configs, and so
    vLLM reads them.

    Args:
        text: The config of a language model.
    """
    most = int(text.max_position_embeddings)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") not in _MULTIPLIED:
        return most
    factor = float(rope.get("factor") or 1)
    original = rope.get("original_max_position_embeddings")
    return max(most, int(int(original) * factor)) if original else int(most * factor)
