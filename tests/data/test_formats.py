"""Examples of every format become the same Example; what is wrong is said with file, place and id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qllava.config import InputError
from qllava.conversation import Conversation, Turn
from qllava.data.formats import Example, read_examples
from qllava.data.problems import Place

HUMAN = {"from": "human", "value": "What is it?"}
GPT = {"from": "gpt", "value": "A bus."}
SEEN = {"from": "human", "value": "<image>\nWhat is it?"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "deep/c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / name)
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    return tmp_path


def read(folder: Path, *rows: Any, suffix: str = "json") -> list[Example]:
    path = folder / f"train.{suffix}"
    lines = suffix == "jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(list(rows)), encoding="utf-8")
    return read_examples(path, folder / "pictures")


def llava(*turns: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"id": "x7", "conversations": list(turns), **more}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    "row",
    [
        llava(SEEN, GPT, image="a.png"),
        llava({"from": "human", "value": "What is it?\n<image>"}, GPT, image=["a.png"]),
        llava(
            {"from": "gpt", "value": "Hello!"}, {"from": "human", "value": " <image> What is it? "}, GPT, image="a.png"
        ),
        {
            "id": "x7",
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": "<image>What is it?"},
                {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
            ],
        },
        {
            "id": "x7",
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]},
                {"role": "assistant", "content": "A bus."},
            ],
        },
        {"id": "x7", "image": "a.png", "question": "What is it?", "answer": "A bus."},
    ],
)
def test_every_format_gives_the_same_example(folder: Path, row: dict[str, Any], suffix: str) -> None:
    (example,) = read(folder, row, suffix=suffix)
    assert example == Example(
        id="x7",
        images=(folder / "pictures" / "a.png",),
        conversation=Conversation((Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A bus."))),
        place=Place(str(folder / f"train.{suffix}"), line=1, row=1 if suffix == "json" else None),
        lost=row["conversations"][0]["from"] == "gpt" if "conversations" in row else False,
    )
    assert example.where == f"train.{suffix}, {'example' if suffix == 'json' else 'line'} 1, id x7"


def test_rows_without_images_with_several_and_in_later_turns(folder: Path) -> None:
    several = {"from": "human", "value": "Is <image> like <image>?"}
    later = {"from": "human", "value": "And this? <image>"}
    text, two, late = read(
        folder,
        llava(HUMAN, GPT),
        llava(several, GPT, image=["b.png", "deep/c.png"]),
        llava(HUMAN, GPT, later, GPT, image="a.png"),
    )
    assert text.images == ()
    assert [path.name for path in two.images] == ["b.png", "c.png"]
    assert two.conversation.turns[0].content == several["value"]
    assert late.conversation.turns[2].content == "<image>\nAnd this?"


def test_what_is_optional(folder: Path) -> None:
    rows = [
        {"question": "What?", "answer": "That.", "type": "form", "image": None},
        {"id": 17, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                                {"role": "assistant", "content": "Ho"}]},
    ]  # fmt: skip
    first, second = read(folder, *rows, suffix="jsonl")
    assert (first.id, first.type, first.images) == ("line 1", "form", ())
    assert (second.id, second.conversation.system) == ("17", "Be brief.")


def test_images_lie_beside_the_file_when_no_folder_is_given(folder: Path) -> None:
    path = folder / "pictures" / "train.json"
    path.write_text(json.dumps([llava(SEEN, GPT, image="a.png")]))
    assert read_examples(path)[0].images == (folder / "pictures" / "a.png",)


def test_a_byte_order_mark_blank_lines_and_line_separators_inside_a_text(folder: Path) -> None:
    row = {"question": "one\u2028two", "answer": "three"}
    path = folder / "train.jsonl"
    path.write_text(f"\ufeff\n{json.dumps(row, ensure_ascii=False)}\n\n", encoding="utf-8")
    (example,) = read_examples(path)
    assert str(example.place) == "train.jsonl, line 2"
    assert example.conversation.turns[0].content == "one\u2028two"


BROKEN_ROWS = {
    "no object": (["a"], "example 2: an example is a JSON object, not a list"),
    "id of a wrong type": (llava(HUMAN, GPT) | {"id": [1]}, "example 2: the id is a list"),
    "no known key": ({"id": "x7", "text": "a"}, "example 2, id x7: an example has one of the keys conversations"),
    "two kinds": (llava(HUMAN, GPT, question="a"), "this one has conversations and question"),
    "conversations is no list": ({"id": "x7", "conversations": "a"}, "must be a list of turns, not a text"),
    "no turns": (llava(), "must be a list of turns, not an empty list"),
    "a turn is no object": (llava("a"), "turn 1 is a text"),  # type: ignore[arg-type]
    "unknown role": (llava({"from": "bot", "value": "a"}, GPT), "turn 1 has 'from': 'bot'; expected human or gpt"),
    "role under the wrong key": (llava({"sender": "user", "text": "a"}), "turn 1 has 'from': missing"),
    "no words": (llava({"from": "human"}, GPT), "turn 1 has no text under 'value'"),
    "words of a wrong type": (llava(HUMAN, {"from": "gpt", "value": 3}), "turn 2 has no text under 'value'"),
    "only an answer": (llava(GPT), "no turn of the human"),
    "two leading answers": (llava(GPT, GPT, HUMAN, GPT), "turn 1 is the assistant's and begins"),
    "two questions in a row": (llava(HUMAN, HUMAN, GPT), "turn 2 is the user's and follows another turn"),
    "two answers in a row": (llava(HUMAN, GPT, GPT), "turn 3 is the assistant's and follows another turn"),
    "ends with the human": (llava(HUMAN, GPT, HUMAN), "ends with the user"),
    "a late system prompt": (llava(HUMAN, {"from": "system", "value": "a"}, GPT), "move it to the start"),
    "empty answer": (llava(HUMAN, {"from": "gpt", "value": " \n"}), "turn 2 is an empty answer"),
    "empty question": (llava({"from": "human", "value": ""}, GPT), "turn 1 is an empty question"),
    "<image> without an image": (llava(SEEN, GPT), "hold 1 <image>, the example names 0 images"),
    "an image without <image>": (llava(HUMAN, GPT, image="a.png"), "hold 0 <image>, the example names 1 image"),
    "fewer images": (llava(SEEN, GPT, SEEN, GPT, image="a.png"), "hold 2 <image>, the example names 1 image"),
    "<image> in an answer": (llava(SEEN, {"from": "gpt", "value": "<image>"}, image="a.png"), "turn 2 is an answer"),
    "<image> in a system prompt": (llava({"from": "system", "value": "<image>"}, HUMAN, GPT), "system prompt contains"),
    "image and images": (llava(SEEN, GPT, image="a.png", images=["a.png"]), "both image and images"),
    "image of a wrong type": (llava(SEEN, GPT, image=3), "must be a file name or a list of file names"),
    "image is missing": (llava(SEEN, GPT, image="gone.png"), "'gone.png' is not in the image folder"),
    "image is a folder": (llava(SEEN, GPT, image="deep"), "'deep' is not in the image folder"),
    "image is an address": (llava(SEEN, GPT, image="https://host/a.png"), "is an address; download it"),
    "image is pixels": (llava(SEEN, GPT, image="iVBORw0KGgo" * 999), "is not in the image folder"),
    "image leaves the folder": (llava(SEEN, GPT, image="../outside.png"), "is outside the image folder"),
    "image leaves in the middle": (llava(SEEN, GPT, image="deep/../../outside.png"), "is outside the image folder"),
    "image is elsewhere": (llava(SEEN, GPT, image="/etc/hostname"), "is outside the image folder"),
    "a part of another type": (
        {"id": "x7", "messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "turn 1 has a part that is neither",
    ),
    "question without an answer": ({"id": "x7", "question": "a"}, "the answer is missing"),
    "answer of a wrong type": ({"id": "x7", "question": "a", "answer": 3}, "the answer is a number"),
    "type of a wrong type": ({"id": "x7", "question": "a", "answer": "b", "type": []}, "the type is an empty list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_ROWS)
def test_a_broken_row_is_named(folder: Path, name: str) -> None:
    row, message = BROKEN_ROWS[name]
    with pytest.raises(InputError) as error:
        read(folder, llava(HUMAN, GPT), row)
    said = str(error.value)
    assert message in said
    assert said.startswith("train.json, example 2")
    assert "id x7" in said or not isinstance(row, dict) or row.get("id") != "x7"
    assert "\n" not in said and said.endswith(".")
    with pytest.raises(InputError, match=r"train\.jsonl, line 2"):
        read(folder, llava(HUMAN, GPT), row, suffix="jsonl")


def test_an_absolute_name_inside_the_folder_is_taken(folder: Path) -> None:
    inside = folder / "pictures" / "a.png"
    assert read(folder, llava(SEEN, GPT, image=str(inside)))[0].images == (inside,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"question": "a", "answer": "b"},\n {"id": }]', "train.json, line 2: this is not valid JSON"),
        ('{"question": "a", "answer": "b"}\n{"question": "a"\n', "train.json, line 2: this is not valid JSON"),
        ('{\n"question": "a"\n}', "train.json, line 1: this is not valid JSON"),
        ("question,answer\n", "the file contains no examples"),
        ("", "the file contains no examples"),
        (" \n\n", "the file contains no examples"),
        ("[]", "the file contains no examples"),
    ],
)
def test_a_broken_file_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "train.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_examples(folder / "train.json")


def test_a_file_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.json: the data file cannot be read"):
        read_examples(folder / "gone.json")
    with pytest.raises(InputError, match="this is a folder without data files"):
        read_examples(folder)
    (folder / "train.json").write_bytes(b'[{"question": "\xff"}]')
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_examples(folder / "train.json")
