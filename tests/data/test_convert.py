"""Examples are written as rows, and these rows give the same examples again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qllava.conversation import IMAGE_TOKEN
from qllava.data.convert import llava_row, messages_row
from qllava.data.formats import Pictures, to_example
from qllava.data.problems import Place, RowError
from tests.data.container_files import ROWS, turns

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip()) and "<" not in text
)


@st.composite
def llava_rows(draw: st.DrawFn) -> dict[str, Any]:
    """LLaVA rows of every shape: pictures in any turn and place, a system prompt, an answer too many at the start."""
    said: list[dict[str, str]] = []
    pictures = 0
    for _ in range(draw(st.integers(1, 3))):
        pieces = [draw(words)]
        for _ in range(draw(st.integers(0, 2))):
            pieces.insert(draw(st.integers(0, len(pieces))), IMAGE_TOKEN)
            pictures += 1
        said += turns(draw(st.sampled_from(["", "\n", " "])).join(pieces), draw(words))
    if draw(st.booleans()):
        said.insert(0, {"from": "gpt", "value": draw(words)})
    if draw(st.booleans()):
        said.insert(0, {"from": "system", "value": draw(words | st.just(""))})
    row: dict[str, Any] = {"conversations": said}
    names = [draw(st.sampled_from(["red.png", "./blue.png", "deep/../red.png"])) for _ in range(pictures)]
    if names:
        row["image"] = names[0] if len(names) == 1 and draw(st.booleans()) else names
    for key, value in (("id", words | st.integers()), ("type", words | st.just(""))):
        if draw(st.booleans()):
            row[key] = draw(value)
    return row


class TestConvert:
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(row=llava_rows())
    def test_llava_to_messages_and_back_loses_nothing(self, folder: Path, row: dict[str, Any]) -> None:
        pictures = Pictures(folder)
        first = to_example(row, Place("a.json", row=3), pictures)
        example = replace(first, lost=False)  # a leading answer is dropped at the first reading, and then is not there
        messages = json.loads(json.dumps(messages_row(example, folder)))
        again = to_example(messages, Place("b.json", row=1), pictures)
        assert replace(again, place=example.place) == example
        back = json.loads(json.dumps(llava_row(again, folder)))
        last = to_example(back, Place("c.json", row=2), pictures)
        assert replace(last, place=example.place) == example
        assert messages_row(last, folder) == messages
        assert llava_row(last, folder) == back

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
    def test_rows_that_are_in_order_come_back_as_they_were(self, folder: Path, row: dict[str, Any]) -> None:
        example = to_example(row, Place("a.json"), Pictures(folder))
        assert llava_row(example, folder) == row

    def test_messages(self, folder: Path) -> None:
        example = to_example(ROWS[3], Place("a.json"), Pictures(folder))
        assert messages_row(example, folder) == {
            "id": "late",
            "images": ["blue.png"],
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "<image>\nThis?"},
                {"role": "assistant", "content": "Blue."},
            ],
        }

    def test_a_picture_of_another_folder(self, folder: Path, tmp_path: Path) -> None:
        example = to_example(ROWS[0], Place("a.json", row=1), Pictures(folder))
        with pytest.raises(RowError) as error:
            llava_row(example, tmp_path / "other")
        assert str(error.value) == (
            f"a.json, row 1, id one: the picture '{folder}/red.png' lies outside the image folder {tmp_path}/other; "
            "copy it there, or give its folder."
        )
