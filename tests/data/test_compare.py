"""Examples compared with examples: over several files, in tables of several pieces, as a reader of them all would."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qllava.conversation import CHATML
from qllava.data import check as module
from qllava.data.check import Checked, check, numbers
from qllava.data.compare import leaked, repeated
from qllava.data.encode import Encoder
from qllava.data.problems import Problem
from qllava.data.verdict import Verdict
from tests.tiny_models import IMAGE_LAYOUT, make_tiny_tokenizer


@cache
def encoder() -> Encoder:
    tokenizer = make_tiny_tokenizer()
    return Encoder(tokenizer, CHATML, tokenizer.convert_tokens_to_ids("<image>"), IMAGE_LAYOUT)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_ROWS", 2)  # examples of a piece
    monkeypatch.setattr(module, "_ALONE", 1_000_000)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / name)
    return tmp_path


def row(id: str | None, *said: str, image: str | list[str] | None = None) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[n % 2], "value": words} for n, words in enumerate(said)]
    return {"conversations": turns} | ({} if id is None else {"id": id}) | ({} if image is None else {"image": image})


def checked(folder: Path, name: str, *rows: dict[str, Any]) -> Checked:
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return check(folder / name, None, encoder(), progress=False)


def again(*parts: Checked) -> list[str]:
    problems: list[Problem] = []
    repeated(parts, problems.append)
    return [f"{problem.kind}: {problem.place}, {problem.id}: {problem.problem}" for problem in problems]


def leaks(parts: Sequence[Checked], *evaluation: Checked) -> list[str]:
    problems: list[Problem] = []
    leaked(parts, evaluation, problems.append)
    assert {problem.kind for problem in problems} <= {"in the evaluation"}
    return [f"{problem.place}, {problem.id}" for problem in problems]


class TestRepeated:
    def test_rows_that_differ_are_not(self, folder: Path) -> None:
        rows = [
            row("1", "<image>\nWhat?", "A bus.", image="a.png"),
            row("2", "<image>\nWhat?", "A bus.", image="b.png"),
            row("3", "<image>\nWhat?", "A car.", image="a.png"),
            row("4", "What?", "A bus."),
            row("5", "What?", "A bus.", "Where?", "Here."),
            row("6", "<image><image> What?", "A bus.", image=["a.png", "b.png"]),
            row("7", "<image><image> What?", "A bus.", image=["b.png", "a.png"]),
        ]
        assert again(checked(folder, "t.jsonl", *rows)) == []

    def test_each_is_compared_with_the_first(self, folder: Path) -> None:
        bus, car = ("What?", "A bus."), ("What?", "A car.")
        rows = [row(None, *said) for said in (car, bus, bus, ("Hello", "Ho"), car, bus)]
        said = (
            "duplicate: t.jsonl, line {}, None: the example has the same text and the same images as t.jsonl, line {}"
        )
        assert again(checked(folder, "t.jsonl", *rows)) == [said.format(n, of) for n, of in ((3, 2), (5, 1), (6, 2))]

    def test_rows_of_two_files(self, folder: Path) -> None:
        first = checked(folder, "1.jsonl", row("x", "What?", "A bus."), row("y", "Who?", "I."))
        second = checked(folder, "2.jsonl", row("z", "Who?", "You."), row("y", "Why?", "So."), row("w", "Who?", "I."))
        assert again(first, second) == [
            "duplicate: 2.jsonl, line 3, w: the example has the same text and the same images as 1.jsonl, line 2",
            "duplicate id: 2.jsonl, line 2, y: 1.jsonl, line 2 has the same id",
        ]
        assert again(first) == again(second) == []

    def test_rows_about_one_image_may_bear_its_id(self, folder: Path) -> None:
        """As LLaVA's do; one about another image, or about none, may not."""
        seen = ("<image>\nWhat?", "<image>\nWhere?", "<image>\nWho?")
        about = [row("p1", asked, "That.", image="a.png") for asked in seen]
        assert again(checked(folder, "t.jsonl", *about)) == []
        others = [row("p1", seen[0], "That.", image="b.png"), row("p1", "Hello", "Ho"), row("p1", "Hi", "Ha")]
        assert again(checked(folder, "t.jsonl", *about, *others)) == [
            f"duplicate id: t.jsonl, line {line}, p1: t.jsonl, line 1 has the same id" for line in (4, 5, 6)
        ]

    def test_a_row_without_an_id_has_no_id_in_common(self, folder: Path) -> None:
        parts = [checked(folder, f"{n}.jsonl", row(None, f"What {n}?", "That.")) for n in (1, 2)]
        assert again(*parts) == []

    def test_a_file_of_no_sample_changes_nothing(self, folder: Path) -> None:
        """Its empty columns keep the type of the others: as floats, hashes would lose their last bits."""
        rows = [row("x", "What?", "A bus."), row("y", "What?", "A bus.")]
        full, empty = checked(folder, "1.jsonl", *rows), checked(folder, "2.jsonl", row("z", "What?"))
        assert numbers(empty.table, "content_hash").dtype == np.uint64
        assert len(again(empty, full, empty)) == 1
        assert leaks([empty], full) == leaks([full], empty) == []
        assert leaks([full], empty, full) == ["1.jsonl, line 1, x", "1.jsonl, line 2, y"]


class TestLeaked:
    def test_one_answer_of_many_is_enough(self, folder: Path) -> None:
        held = checked(folder, "e.jsonl", row("e", "<image>\nWhere?", "Here.", image="a.png"))
        train = checked(
            folder, "t.jsonl",
            row("1", "<image>\nWhat?", "A bus.", "Where?", "Here.", image="a.png"),
            row("2", "<image>\nWhere?", "There.", image="a.png"),
            row("3", "<image>\nWhere?", "Here.", image="b.png"),
            row("4", "Where?", "Here."),
            row("5", "Where? <image>", "Here. ", image="a.png"),
        )  # fmt: skip
        assert leaks([train], held) == ["t.jsonl, line 1, 1", "t.jsonl, line 5, 5"]

    def test_over_several_files_of_both(self, folder: Path) -> None:
        said = [("What?", "A bus."), ("Who?", "I."), ("Why?", "So."), ("When?", "Now.")]
        first = checked(folder, "1.jsonl", *(row(f"{n}", *words) for n, words in enumerate(said[:3])))
        second = checked(folder, "2.jsonl", row("a", "Hello", "Ho"), row("b", *said[3]))
        held = [checked(folder, f"e{n}.jsonl", row(None, *said[n])) for n in (2, 3)]
        assert leaks([first, second], *held) == ["1.jsonl, line 3, 2", "2.jsonl, line 2, b"]
        verdict = Verdict.over([first, second], held)
        assert not verdict.ok and verdict.errors == 0
        assert str(next(verdict.problems())) == (
            "1.jsonl, line 3, id 2: a question with its images and answer is in the evaluation file too; "
            "remove it from one of the two, or the evaluation measures memorized answers."
        )
        assert "A run would start, but not every example" in verdict.text()
        assert Verdict.over([first, second]).ok

    def test_problems_of_held_out_rows_count(self, folder: Path) -> None:
        train = checked(folder, "t.jsonl", row("1", "What?", "A bus."))
        held = checked(folder, "e.jsonl", row("2", "Where?"))
        verdict = Verdict.over([train], [held])
        assert (verdict.ok, verdict.errors) == (False, 1)
        assert [problem.id for problem in verdict.problems()] == ["2"]
        assert verdict.as_json()["samples"] == 1

    def test_what_stands_twice_may_be_meant(self, folder: Path) -> None:
        verdict = Verdict.over([checked(folder, "t.jsonl", *[row(None, "What?", "A bus.")] * 3)])
        assert verdict.ok and "note: duplicate (2)" in verdict.text()
        assert [problem["severity"] for problem in verdict.as_json()["problems"]] == ["note", "note"]


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["1", "2", "3"]),
        st.sampled_from([None, "a.png", "b.png"]),
        st.lists(st.tuples(st.sampled_from("qr"), st.sampled_from("xy")), min_size=1, max_size=2),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(ROWS, min_size=1, max_size=2), evaluation=ROWS)
def test_as_whoever_reads_all_rows_would_find(folder: Path, files: list[list[Any]], evaluation: list[Any]) -> None:
    """Everything kept in dictionaries, in place of sorted hashes."""

    def written(name: str, rows: list[Any]) -> Checked:
        made = []
        for id, image, rounds in rows:
            said = [words for pair in rounds for words in pair]
            said[0] = said[0] if image is None else f"<image>\n{said[0]}"
            made.append(row(id, *said, image=image))
        return checked(folder, name, *made)

    parts = [written(f"{n}.jsonl", rows) for n, rows in enumerate(files)]
    held = {(image, *pair) for _, image, rounds in evaluation for pair in rounds}
    contents: dict[Any, str] = {}
    ids: dict[str, tuple[str, Any, Any]] = {}
    same, names, found = [], [], []
    for n, rows in enumerate(files):
        for line, (id, image, rounds) in enumerate(rows, start=1):
            at, content = f"{n}.jsonl, line {line}", (image, tuple(rounds))
            if content in contents:
                same.append(f"duplicate: {at}, {id}: the example has the same text and the same images as "
                            f"{contents[content]}")  # fmt: skip
            contents.setdefault(content, at)
            first, shown, what = ids.setdefault(id, (at, image, content))
            if first != at and (image is None or image != shown or content == what):
                names.append(f"duplicate id: {at}, {id}: {first} has the same id")
            if any((image, *pair) in held for pair in rounds):
                found.append(f"{at}, {id}")
    assert again(*parts) == same + names
    assert leaks(parts, written("e.jsonl", evaluation)) == found
