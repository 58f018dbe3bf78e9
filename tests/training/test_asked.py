"""Which held-out examples are asked: drawn by the seed or evenly spaced, and none whose prompt may not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qllava.conversation import TEMPLATES
from qllava.data.encode import Encoder
from qllava.image_layout import ImageLayout
from qllava.training.asked import HeldOut
from qllava.training.data import Part, Prepared, prepare
from tests.tiny_models import make_tiny_processor, make_tiny_records
from tests.tiny_runs import write_records


def held_out(parts: list[Part], **limits: Any) -> Prepared:
    tokenizer = make_tiny_processor().tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    encoder = Encoder(tokenizer, TEMPLATES["chatml"], image, ImageLayout(2, 2), **limits)
    _, found = prepare([Part(make_tiny_records(parts[0].path.parent), None)], encoder, seed=0, evaluation=parts)
    assert found is not None
    return found


def ids(examples: list[Any]) -> list[str]:
    return [str(example.id) for example in examples]


def test_over_all_files_and_all_rows_where_there_are_no_more(tmp_path: Path) -> None:
    parts = [Part(make_tiny_records(tmp_path), None)] * 2
    asked = HeldOut(parts, held_out(parts))
    assert ids(asked.drawn(6, 0)) == ids(asked.drawn(6, 0)) != ids(asked.drawn(6, 1)) and len(asked.drawn(6, 0)) == 6
    assert ids(asked.drawn(1000, 0)) == ids(asked.drawn(16, 5)) and len(asked.drawn(1000, 0)) == 16
    assert ids(asked.spaced(4)) == ["row-0", "row-4"] * 2
    none = HeldOut([], None)
    assert none.drawn(5, 0) == none.spaced(5) == asked.drawn(0, 0) == asked.spaced(0) == []


@pytest.mark.parametrize(("too_long", "kind"), [("drop", "dropped"), ("trim", "trimmed")])
def test_rows_that_are_too_long_are_not_asked(tmp_path: Path, too_long: str, kind: str) -> None:
    """Every second example ends with a question beyond max_length: it is dropped, or loses that question."""
    rows = json.loads(make_tiny_records(tmp_path).read_text(encoding="utf-8"))
    for number, row in enumerate(rows):
        row["conversations"] = row["conversations"][:2]
        if number % 2 == 0:
            long = [{"from": "human", "value": "many " * 300}, {"from": "gpt", "value": "one"}]
            row["conversations"] += long
    parts = [Part(write_records(tmp_path / "long.json", rows), None), Part(tmp_path / "rows.json", None)]
    found = held_out(parts, max_length=250, too_long=too_long)
    assert found.count(kind) == 4
    asked = HeldOut(parts, found)
    sound = [f"row-{number}" for number in (1, 3, 5, 7)]
    everything = sound + [f"row-{number}" for number in range(8)]
    assert ids(asked.drawn(1000, 0)) == ids(asked.spaced(1000)) == everything
    assert ids(asked.spaced(4)) == ["row-1", "row-5", "row-0", "row-4"]
    assert len(asked.drawn(3, 0)) == 3
