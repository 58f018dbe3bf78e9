"""One table of keys: aliases give the same examples in every format, and no key is dropped in silence."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qllava.conversation import CHATML
from qllava.data.check import Checked, check
from qllava.data.encode import IGNORE_INDEX, Encoder
from qllava.data.formats import Example, ImageFolder, read_examples, to_example
from qllava.data.keys import REFUSED, SPELLINGS
from qllava.data.problems import RecordError
from qllava.data.records import read_records
from tests.tiny_models import IMAGE_LAYOUT, make_tiny_tokenizer

TALK = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A bus."}]
CHAT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A bus."}]
ASKED = {"question": "What is it?", "answer": "A bus."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("unused.png", "green")):
        image = Image.new("RGB", (6, 4), colour)
        image.putpixel((0, 0), (9, 9, 9))
        image.save(tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer = make_tiny_tokenizer()
    return Encoder(tokenizer, CHATML, tokenizer.convert_tokens_to_ids("<image>"), IMAGE_LAYOUT)


def as_csv(records: list[dict[str, Any]]) -> bytes:
    columns = list(dict.fromkeys(key for record in records for key in record))
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(columns)
    for record in records:
        values = [record.get(column, "") for column in columns]
        writer.writerow([v if isinstance(v, str) else json.dumps(v) for v in values])
    return file.getvalue().encode()


def as_parquet(records: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), file)
    return file.getvalue()


def as_arrow(records: list[dict[str, Any]], new: Callable[..., Any]) -> bytes:
    table, file = pa.Table.from_pylist(records), io.BytesIO()
    with new(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def as_tar(records: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number, record in enumerate(records):
            member = tarfile.TarInfo(f"{number}.json")
            data = json.dumps(record).encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "list.json": lambda records: json.dumps(records).encode(),
    "lines.jsonl": lambda records: "\n".join(map(json.dumps, records)).encode(),
    "t.csv": as_csv,
    "t.parquet": as_parquet,
    "t.arrow": lambda records: as_arrow(records, pa.ipc.new_file),
    "stream.arrow": lambda records: as_arrow(records, pa.ipc.new_stream),
    "t.tar": as_tar,
}


def read(folder: Path, kind: str, *records: dict[str, Any]) -> list[Example]:
    path = folder / kind
    path.write_bytes(KINDS[kind](list(records)))
    return read_examples(path)


def learned(example: Example) -> Any:
    return [p.name for p in example.images], example.conversation, example.type


ALIASES = {
    # meaning: (a record in the preferred keys, the keys that are exchanged)
    "image": ({"image": "a.png", **ASKED}, "image"),
    "conversations": ({"conversations": TALK}, "conversations"),
    "question": ({"image": "a.png", **ASKED}, "question"),
    "answer": ({"image": "a.png", **ASKED}, "answer"),
    "caption": ({"image": "a.png", "caption": "A bus."}, "caption"),
    "system": ({"system": "Be brief.", "conversations": TALK}, "system"),
    "id": ({"id": "x7", **ASKED}, "id"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("meaning", ALIASES)
def test_every_alias_gives_the_same_example(folder: Path, meaning: str, kind: str) -> None:
    record, key = ALIASES[meaning]
    (expected,) = read(folder, kind, record)
    assert meaning != "image" or expected.images
    for alias in SPELLINGS[meaning]:
        for spelled in (alias, alias.title()):
            (example,) = read(folder, kind, {spelled if k == key else k: v for k, v in record.items()})
            assert learned(example) == learned(expected), spelled
            assert example.unread == ()
            assert meaning != "id" or example.id == "x7"


@pytest.mark.parametrize("kind", KINDS)
def test_alpaca_with_and_without_an_image(folder: Path, kind: str) -> None:
    record = {"instruction": "Translate.", "input": "Ein Bus.", "output": "A bus.", "system": "Be brief."}
    (text,) = read(folder, kind, record)
    assert text.conversation.system == "Be brief."
    assert [turn.content for turn in text.conversation.turns] == ["Translate.\nEin Bus.", "A bus."]
    (seen,) = read(folder, kind, {"image": "a.png", "instruction": "What is it?", "input": "", "output": "A bus."})
    assert [turn.content for turn in seen.conversation.turns] == ["<image>\nWhat is it?", "A bus."]
    assert seen.unread == ()


@pytest.mark.parametrize("kind", KINDS)
def test_several_images_are_a_list_in_every_format(folder: Path, kind: str) -> None:
    (example,) = read(folder, kind, {"images": ["a.png", "b.png"], **ASKED})
    assert [p.name for p in example.images] == ["a.png", "b.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_alpacas_history_comes_first(folder: Path, kind: str) -> None:
    record = {"image": "a.png", "instruction": "And now?", "output": "Red.", "history": [["What is it?", "A bus."]]}
    (example,) = read(folder, kind, record)
    assert [turn.content for turn in example.conversation.turns] == [
        "<image>\nWhat is it?", "A bus.", "And now?", "Red.",
    ]  # fmt: skip


def checked(folder: Path, kind: str, encoder: Encoder, *records: dict[str, Any]) -> Checked:
    path = folder / kind
    path.write_bytes(KINDS[kind](list(records)))
    return check(path, None, encoder, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_nobody_reads_is_reported_once_with_its_count(folder: Path, kind: str, encoder: Encoder) -> None:
    records = [{"id": str(i), "question": f"{i}?", "answer": "Yes.", "source": "web"} for i in range(7)]
    records[3].pop("source")
    found = [str(problem) for problem in checked(folder, kind, encoder, *records).problems()]
    assert len(found) == 1
    assert found[0].startswith(f"{kind}, ")
    assert "6 records have the key 'source', which is not read; " in found[0]


def test_many_keys_are_reported_together(folder: Path, encoder: Encoder) -> None:
    records = [{**ASKED, "question": f"{i}?", f"key{i}": 1} for i in range(300)]
    problems = list(checked(folder, "list.json", encoder, *records).problems())
    assert len(problems) == 101 and all(problem.severity == "note" for problem in problems)
    assert "200 records have other keys, which are not read" in str(problems[-1])


def test_what_says_nothing_is_not_reported(folder: Path) -> None:
    (example,) = read(folder, "list.json", {**ASKED, "model": "", "tools": "[]", "videos": [], "x": None, "loss": 1})
    assert example.unread == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["photo", "image_id", "path"])
def test_an_image_under_a_key_that_nobody_reads_is_an_error(folder: Path, kind: str, key: str) -> None:
    with pytest.raises(RecordError, match=f"the key '{key}' is not read and names the image 'a.png'; put it under"):
        read(folder, kind, {"id": "x7", **ASKED, key: "a.png"})
    (example,) = read(folder, kind, {"id": "x7", **ASKED, key: "gone.png"})
    assert example.unread == (key,)


def test_an_image_inside_an_object_and_one_in_a_turn_are_found_too(folder: Path) -> None:
    with pytest.raises(RecordError, match="the key 'meta' is not read and names the image 'a.png'"):
        read(folder, "list.json", {**ASKED, "meta": {"shown": ["b.txt", "a.png"]}})
    turn = {"from": "human", "value": "What?", "picture": "a.png"}
    with pytest.raises(RecordError, match=r"'conversations\[\]\.picture' is not read and names"):
        read(folder, "list.json", {"conversations": [turn, TALK[1]]})


def test_embedded_images_under_a_key_that_nobody_reads_are_an_error(folder: Path) -> None:
    data = (folder / "a.png").read_bytes()
    for value in (data, {"bytes": data, "path": "x"}):
        with pytest.raises(RecordError, match="the key 'photo' is not read and contains an image"):
            read(folder, "t.parquet", {**ASKED, "photo": value})
    (example,) = read(folder, "t.parquet", {**ASKED, "sound": b"RIFF no image"})
    assert example.unread == ("sound",)


def test_an_alias_beside_the_key_itself_is_not_read(folder: Path) -> None:
    """Hugging Face's tables often keep a file's old name beside the image."""
    (example,) = read(folder, "list.json", {"image": "a.png", "file_name": "000.jpg", **ASKED})
    assert [p.name for p in example.images] == ["a.png"] and example.unread == ("file_name",)
    (example,) = read(folder, "list.json", {"image": "a.png", "file_name": "a.png", **ASKED})
    assert example.unread == ("file_name",)
    with pytest.raises(RecordError, match="the key 'file_name' is not read and names the image 'b.png'"):
        read(folder, "list.json", {"image": "a.png", "file_name": "b.png", **ASKED})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_change_what_others_learn_are_refused(folder: Path, kind: str, key: str) -> None:
    with pytest.raises(RecordError, match=f"the key '{key}' is not supported; {REFUSED[key]}"):
        read(folder, kind, {"id": "x7", **ASKED, key: "ball.mp4"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", 0),
        ("weight", 0.0),
        ("label", False),
        ("loss", False),
        ("train", False),
        ("train", 0),
        ("train", "no"),
    ],
)
def test_an_answer_that_is_not_to_be_learned_is_only_read(folder: Path, encoder: Encoder, key: str, value: Any) -> None:
    turns = [*CHAT[:1], CHAT[1] | {"content": "blue", key: value}, {"role": "user", "content": "Look again."},
             {"role": "assistant", "content": "red"}]  # fmt: skip
    (example,) = read(folder, "list.json", {"messages": turns})
    if value == "no":
        assert example.unread == ("messages[].train",)
        return
    assert [turn.learned for turn in example.conversation.turns] == [True, False, True, True]
    sample = encoder.encode(example)
    assert sample is not None
    words = [i for i, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORE_INDEX]
    assert encoder.tokenizer.decode(words) == "red<|im_end|>"
    assert "blue" in encoder.tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_of_which_nothing_is_learned_is_an_error(folder: Path, kind: str) -> None:
    with pytest.raises(RecordError, match=r"turns learning off for all of its turns \('label'\)"):
        read(folder, kind, {"id": "x7", **ASKED, "label": False})
    with pytest.raises(RecordError, match="no answer of this conversation is used for training"):
        read(folder, kind, {"id": "x7", "messages": [CHAT[0], CHAT[1] | {"weight": 0}]})


def test_a_label_that_is_a_class_is_not_obeyed(folder: Path) -> None:
    for label in (0, 3, "bus"):
        assert read(folder, "list.json", {**ASKED, "label": label})[0].unread == ("label",)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**ASKED, "weight": 0.5}, "the weight 0.5 is not supported; write 1 for learned"),
        ({"messages": [CHAT[0], CHAT[1] | {"weight": 2}]}, "turn 2: the weight 2 is not supported"),
        ({"messages": [CHAT[0] | {"train": True}, CHAT[1]]}, r"turn 1 is to be learned \(train\) but is not an answer"),
        ({"messages": [CHAT[0], CHAT[1] | {"weight": 0, "train": True}]}, "weight and train of turn 2 disagree"),
        ({"messages": [CHAT[0], CHAT[1] | {"tool_calls": [{}]}]}, "turn 2: the key 'tool_calls' is not supported"),
        ({"messages": [CHAT[0] | {"images": ["a.png"]}, CHAT[1]]}, "turn 1: the key 'images' is not supported"),
        ({"messages": [CHAT[0], CHAT[1] | {"thinking": "Hm."}]}, "turn 2: the key 'thinking' is not supported"),
        ({"system": 3, "messages": CHAT}, "the system prompt is a number"),
        ({"system": "A", "messages": [{"role": "system", "content": "B"}, *CHAT]}, "another prompt under 'system'"),
        ({"question_id": 1, "image": "a.png", "text": "What is it?"}, "this one has none of them"),
        ({"text": "A bus."}, "this one has none of them"),
        ({"instruction": "Hm?", "output": "Yes.", "history": ["a", "b"]}, "the history is not a list of pairs"),
        ({"instruction": "Hm?", "input": 3, "output": "Yes."}, "the input is a number"),
    ],
)
def test_what_cannot_be_obeyed_is_said(folder: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read(folder, "list.json", record)


def test_a_system_prompt_of_the_record_is_a_system_turn(folder: Path) -> None:
    turn = {"from": "system", "value": "Be brief."}
    (of_turn,) = read(folder, "list.json", {"conversations": [turn, *TALK]})
    for record in ({"system": "Be brief."}, {"system_prompt": "Be brief."}, {"system": None, "System": "Be brief."}):
        (example,) = read(folder, "list.json", {**record, "conversations": TALK})
        assert learned(example) == learned(of_turn) or "System" in record
    (same,) = read(folder, "list.json", {"system": "Be brief.", "conversations": [turn, *TALK]})
    assert learned(same) == learned(of_turn)
    (blank,) = read(folder, "list.json", {"system": " ", "conversations": TALK})
    assert blank.conversation.system is None


@pytest.mark.parametrize("conversation", [[{"role": "user", "value": "Hm?"}, {"role": "assistant", "value": "Yes."}]])
def test_turns_in_the_keys_of_the_other_kind(folder: Path, conversation: list[dict[str, str]]) -> None:
    (example,) = read(folder, "list.json", {"conversations": conversation})
    assert [turn.content for turn in example.conversation.turns] == ["Hm?", "Yes."]
    assert example.unread == ()


def test_samples_of_a_tar_hide_nothing(folder: Path) -> None:
    def tar(**members: bytes) -> list[tuple[Any, Any]]:
        with tarfile.open(folder / "t.tar", "w") as file:
            for name, data in members.items():
                member = tarfile.TarInfo(f"one.{name}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
        return list(read_records(folder / "t.tar"))

    png, images = (folder / "a.png").read_bytes(), ImageFolder(folder)
    ((place, row),) = tar(png=png, txt=b"A bus.", json=b'{"width": 6, "caption": "other"}', cls=b"7")
    example = to_example(row, place, images)
    assert [turn.content for turn in example.conversation.turns] == ["<image>", "A bus."]
    assert sorted(example.unread) == [".cls", "width"]
    ((place, row),) = tar(png=png, txt=b"A bus.", json=json.dumps({"conversations": TALK}).encode())
    assert row[".txt"] == "A bus."
    for suffix, key in (("mp4", "video"), ("wav", "audio")):
        ((place, row),) = tar(**{"json": json.dumps(ASKED).encode(), suffix: b"x"})
        with pytest.raises(RecordError, match=f"the key '{key}' is not supported"):
            to_example(row, place, images)


def test_inputs_after_public_reports(reports: Path, encoder: Encoder) -> None:
    one, two = read_examples(reports / "interleaved_parts.jsonl")
    assert learned(one) == learned(two)
    assert one.conversation.turns[0].content == "Is <image> darker than <image>?"
    assert {e.conversation.system for e in read_examples(reports / "system.jsonl")} == {
        "Answer in one upper-case word."
    }
    with pytest.raises(RecordError, match="'video' is not supported"):
        read_examples(reports / "video.jsonl")
    rows = list(read_records(reports / "weight.jsonl"))
    example = to_example(rows[0][1], rows[0][0], ImageFolder(reports))
    assert [turn.learned for turn in example.conversation.turns[1::2]] == [False, True]
    with pytest.raises(RecordError, match="turns learning off for all of its turns"):
        to_example(rows[1][1], rows[1][0], ImageFolder(reports))
