"""What was likely meant by a name that was mistyped."""

from __future__ import annotations

from pathlib import Path

import pytest

from qllava.spelling import close_to, neighbour


@pytest.mark.parametrize(
    ("word", "expected"),
    [("nanoo", "nano"), ("Nano", "nano"), ("naon", "nano"), ("gpt2", None), ("merged2", None), ("mergd", "merged")],
)
def test_the_closest_name(word: str, expected: str | None) -> None:
    assert close_to(word, ["nano", "merged", "photos"]) == expected


def test_names_with_other_digits_are_other_things() -> None:
    assert close_to("llava-1.5-7b-hf", ["llava-1.5-13b-hf"]) is None
    assert close_to("lava-1.5-13b-hf", ["llava-1.5-13b-hf"]) == "llava-1.5-13b-hf"


def test_what_is_next_to_a_missing_path(tmp_path: Path) -> None:
    (tmp_path / "finetune_lora").mkdir()
    (tmp_path / "finetune_lr.json").touch()
    assert neighbour(tmp_path / "finetune_lra", folders=True) == tmp_path / "finetune_lora"
    assert neighbour(tmp_path / "finetune_l.json") == tmp_path / "finetune_lr.json"
    assert neighbour(tmp_path / "finetune_lr.jsonl") == tmp_path / "finetune_lr.json"
    assert neighbour(tmp_path / "other.json") is None
    assert neighbour(tmp_path / "no" / "finetune_lora") is None
