"""Whatever lies in a data file: `check` raises nothing, says every problem in one line, and what it passes trains."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaForConditionalGeneration

from qllava.conversation import CHATML
from qllava.data.check import Checked, check
from qllava.data.collate import Collator
from qllava.data.encode import Encoder
from qllava.data.verdict import Verdict
from tests.tiny_models import IMAGE_LAYOUT, make_tiny_model, make_tiny_processor

BROKEN = ("text.png", "cut.png")
SOUND = ("red.png", "deep/blue.jpg")

FEW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@dataclass(repr=False)
class Workshop:
    """A folder of images, sound ones and broken ones, and a model that learns from what was passed.

    steps: how often it did.
    """

    folder: Path
    encoder: Encoder
    collator: Collator
    model: LlavaForConditionalGeneration
    steps: int = 0

    def check(self, name: str, content: bytes) -> Checked:
        """Write a data file, and hold the report to all that it promises."""
        path = self.folder / name
        path.write_bytes(content)
        checked = check(path, None, self.encoder, progress=False)
        verdict = Verdict.over([checked])
        problems = list(verdict.problems())
        assert verdict.ok == all(problem.severity == "note" for problem in problems)
        told = json.loads(json.dumps(verdict.as_json(), ensure_ascii=False).encode())
        assert len(told["problems"]) == len(problems)
        verdict.text().encode()
        for problem in problems:
            said = str(problem)
            assert said.encode() and said.isprintable() and said.endswith("."), said
            assert problem.place.file == str(path) and len(said) < 900
            assert problem.id is not None or problem.place.row or problem.place.line or checked.summary.samples == 0
        assert checked.summary.samples == len(checked.table) <= checked.summary.rows
        assert checked.summary.rows or problems
        self.learn(checked)
        return checked

    def learn(self, checked: Checked) -> None:
        """One step over all examples that were passed: those of the table whose images were not refused."""
        rows = checked.table.with_transform(checked.layout)[:]
        sound, refused = [], set()
        for id, ids, labels, images, image_tokens in zip(*rows.values(), strict=True):
            broken = {name for name in images if Path(name).name in BROKEN}
            refused |= broken
            if not broken:
                row = {
                    "id": id,
                    "input_ids": ids,
                    "labels": labels,
                    "image_files": images,
                    "image_tokens": image_tokens,
                }
                sound.append(row)
        assert checked.summary.counts.get("image broken", 0) == len(refused)
        if sound:
            self.steps += 1
            batch = self.collator(sound)
            batch.pop("ids")
            self.model.zero_grad()
            loss = self.model(**batch).loss
            loss.backward()
            assert torch.isfinite(loss), loss
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "deep").mkdir()
    Image.new("RGB", (20, 12), "red").save(folder / "red.png")
    Image.new("CMYK", (9, 40), "blue").save(folder / "deep" / "blue.jpg")
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "red.png").read_bytes()[:-30])
    processor = make_tiny_processor()
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    encoder = Encoder(processor.tokenizer, CHATML, image, IMAGE_LAYOUT, max_length=160)
    collator = Collator(processor.tokenizer.pad_token_id, processor.image_processor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLLAVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Workshop(folder, encoder, collator, make_tiny_model(processor, layers=1).train())


# --- examples: sound ones, and what may become of them ---

CONTROLS = [
    "<|im_end|>",
    "<|im_start|>",
    "<image>",
    "<|endoftext|>",
    "<|im_",
    "end|>",
    "<s>",
    "</s>",
    "<",
    "|>",
    "[INST]",
]
WORDS = st.lists(
    st.sampled_from(["What", " ", "\n", "\t", "bus", ".", "\u2028", "\u0085", "\0", "\u200d", "\ufeff", "\\", '"', "{"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
    | st.sampled_from(CONTROLS),
    max_size=6,
).map("".join)


def sayable(words: str) -> str:
    """Words that a sound example may hold."""
    for control in CONTROLS[:4]:
        words = words.replace(control, "bus")
    return words if words.strip() else "bus"


SAID = WORDS.map(sayable)
IDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
NAMES = st.sampled_from(
    [*SOUND, *SOUND, *BROKEN, "gone.png", "deep", "../red.png", "", "http://host/a.png", "/", ".", "\udcff", "a\0b"]
)
HALVES = st.text(st.characters(categories=["Cs", "Lu"]), max_size=3)  # what JSON can spell and UTF-8 cannot
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | NAMES | HALVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["from", "value", "role", "content", "type", "text", "image", "id"]) | WORDS, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def sound_row(draw: st.DrawFn) -> dict[str, Any]:
    rounds = draw(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=2))
    images = draw(st.lists(st.sampled_from(SOUND), max_size=2))
    said = [words for pair in rounds for words in pair]
    at = draw(st.integers(0, len(rounds) - 1))
    said[2 * at] = "<image>\n" * len(images) + said[2 * at]
    ids = {} if draw(st.booleans()) else {"id": draw(IDS | st.integers())}
    kind = draw(st.sampled_from(["conversations", "messages", "question"]))
    if kind == "question":
        return ids | {"image": images, "question": said[2 * at], "answer": said[2 * at + 1]}
    role, content, sides = {
        "conversations": ("from", "value", ("human", "gpt")),
        "messages": ("role", "content", ("user", "assistant")),
    }[kind]
    turns = [{role: sides[n % 2], content: words} for n, words in enumerate(said)]
    if draw(st.booleans()):
        turns.insert(0, {role: "system", content: draw(SAID)})
    return ids | {"images": images, kind: turns}


def inside(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a value and every key of it."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [pair for key in keys for pair in inside(value[key])]


@st.composite
def mutated_row(draw: st.DrawFn) -> Any:
    row: Any = draw(sound_row())
    for _ in range(draw(st.integers(0, 2))):
        places = inside(row)
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["drop", "replace", "replace", "names", "again", "wrap"])):
            case "drop":
                del container[key]
            case "replace":
                container[key] = draw(JSON)
            case "names":
                container[key] = draw(NAMES | st.lists(NAMES, max_size=2))
            case "again" if isinstance(container, list):
                container.append(container[key])
            case "wrap":
                container[key] = [container[key]]
    return row


# Found by the random search: drawn for a system turn, and then called sound.
HALF_A_CHARACTER = {
    "conversations": [
        {"from": "system", "value": "\ud800"},
        {"from": "human", "value": "Hm?"},
        {"from": "gpt", "value": "Yes."},
    ]
}
ROWS = st.lists(st.one_of(mutated_row(), mutated_row(), mutated_row(), JSON), min_size=1, max_size=5)
WRITERS: dict[str, Callable[[list[Any]], str]] = {
    "list": json.dumps,
    "indented": lambda rows: json.dumps(rows, indent=1),
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
}


def hold_rows(workshop: Workshop, examples: int) -> None:
    """Check and train on so many data files; returns when none was found that breaks a promise."""

    @settings(max_examples=examples, **FEW)
    @example(rows=[HALF_A_CHARACTER], form="list")
    @given(rows=ROWS, form=st.sampled_from([*WRITERS]))
    def hold(rows: list[Any], form: str) -> None:
        checked = workshop.check("rows.json", WRITERS[form](rows).encode())
        # A number or a list at the start of JSONL makes it another kind of file.
        if form != "lines" or isinstance(rows[0], dict):
            assert checked.summary.rows == len(rows)

    before = workshop.steps
    hold()
    assert workshop.steps - before > examples / 4


@settings(max_examples=30, **FEW)
@given(rows=st.lists(sound_row(), min_size=1, max_size=4))
def test_sound_rows_pass_and_train(workshop: Workshop, rows: list[Any]) -> None:
    """Else the tests below would hold because nothing ever passes."""
    before = workshop.steps
    checked = workshop.check("rows.json", json.dumps(rows).encode())
    assume("too long" not in checked.summary.counts)
    assert checked.summary.failing == 0 and checked.summary.samples == len(rows)
    assert workshop.steps == before + 1


def test_rows_of_any_kind(workshop: Workshop) -> None:
    hold_rows(workshop, 200)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_rows_of_any_kind(workshop: Workshop) -> None:
    hold_rows(workshop, 5000)


# --- bytes: sound files in which something was changed, and noise ---

PLAIN = [
    {"id": "one", "image": "red.png", "question": "What is it?", "answer": "A bus."},
    {"id": "two", "image": "deep/blue.jpg", "question": "And this?", "answer": "Blué."},
]
TALK = [{"id": "a", "conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes."}]}] * 3


def as_csv() -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["id", "image", "question", "answer"])
    writer.writeheader()
    writer.writerows(PLAIN)
    return file.getvalue().encode()


def as_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for row in PLAIN:
            data = json.dumps(row).encode()
            member = tarfile.TarInfo(f"{row['id']}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def as_columns(kind: str) -> bytes:
    table, file = pa.Table.from_pylist(PLAIN), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(file, table.schema) as writer:
            writer.write_table(table)
    return file.getvalue()


FILES = {
    "a list": json.dumps(TALK, indent=1).encode(),
    "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in PLAIN).encode(),
    "UTF-16": json.dumps(PLAIN).encode("utf-16"),
    "a table": as_csv(),
    "a tar": as_tar(),
    **{kind: as_columns(kind) for kind in ("parquet", "file", "stream")},
}


@st.composite
def changed_file(draw: st.DrawFn) -> bytes:
    data = bytearray(FILES[draw(st.sampled_from([*FILES]))])
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["word", "word", "word", "set", "insert", "cut", "end", "again"])):
            case "word":  # the file stays sound, and another one: unchanged ones are only drawn once each
                found = max(data.find(word) for word in (b"bus", b"Yes"))
                if found >= 0:
                    data[found : found + 3] = draw(st.text("abcdefgh", min_size=3, max_size=3)).encode()
            case "set":
                new = draw(st.binary(min_size=1, max_size=4))
                data[at : at + len(new)] = new
            case "insert":
                data[at:at] = draw(st.binary(max_size=4) | st.sampled_from([b"\n", b'"', b",", b"[", b"}", b"\\u"]))
            case "cut":
                del data[at : at + draw(st.integers(1, 40))]
            case "end":
                del data[at:]
            case "again":
                data[at:at] = data[: draw(st.integers(0, 300))]
    return bytes(data)


BYTES = st.one_of(changed_file(), changed_file(), changed_file(), st.binary(max_size=40), JSON.map(
    lambda value: json.dumps(value).encode()))  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_it_was(workshop: Workshop, name: str) -> None:
    """Else the tests below would change files that were broken before."""
    checked = workshop.check("rows.any", FILES[name])
    assert checked.summary.samples == (0 if name == "UTF-16" else 3 if name == "a list" else 2)


def hold_bytes(workshop: Workshop, examples: int) -> None:
    @settings(max_examples=examples, **FEW)
    @given(content=BYTES)
    def hold(content: bytes) -> None:
        workshop.check("rows.any", content)

    before = workshop.steps
    hold()
    assert workshop.steps - before > examples / 8


def test_bytes_of_any_kind(workshop: Workshop) -> None:
    hold_bytes(workshop, 200)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_files_of_any_kind(workshop: Workshop) -> None:
    hold_bytes(workshop, 5000)
