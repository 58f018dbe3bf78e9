"""The VQA score: what counts as the same answer, and a file from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllava.config import InputError
from qllava.conversation import Conversation, Turn
from qllava.data.formats import Example
from qllava.evaluation.vqa import (
    evaluate,
    evaluate_file,
    failures_page,
    is_correct,
    normalize,
    read_answer,
    reader,
    score,
)
from qllava.inference import load
from tests.small_memory import small_memory
from tests.tiny_models import make_image, make_tiny_llava


def example(number: int, truth: str, type_: str | None = None) -> Example:
    turns = (Turn("user", f"Question {number}?"), Turn("assistant", truth))
    return Example(str(number), (), Conversation(turns=turns), f"test.json, example {number}", type_)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("Red.", "red"),
        ("The red circle", "red circle"),
        ("two", "2"),
        ("None", "0"),
        ("dont know", "Don't know"),
        ("red-green", "red green"),
        ("1,000", "1000"),
        ("  a\nBIG   dog!", "big dog"),
        ("10:30", "10:30."),
        ("1,000 red-balls", "1000 redballs"),
        ("A", "a"),
    ],
)
def test_the_same_answer(answer: str, truth: str) -> None:
    assert is_correct(answer, truth)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("red", "blue"),
        ("red circle", "circle"),
        ("", "a"),
        ("A", "the"),
        ("+", "-"),
        ("3.5", "35"),
        ("10:30", "1030"),
        ("'left'", "left"),
    ],
)
def test_another_answer(answer: str, truth: str) -> None:
    assert not is_correct(answer, truth)


def test_the_challenge_s_own_normalization() -> None:
    # What the challenge's evaluation code gives for these texts; it was run by itself, and is not part of qllava.
    table = json.loads((Path(__file__).parent / "vqa_table.json").read_text())
    assert len(table) > 300
    assert {text: normalize(text) for text in table} == table


def test_a_score_of_nothing_is_no_zero(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no questions"):
        score([], [])
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(InputError):
        evaluate_file("no/such/model", tmp_path / "none.json")


@given(st.text())
def test_normalizing_twice_changes_nothing(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once


def test_score_by_type() -> None:
    examples = [example(1, "red", "colour"), example(2, "two", "count"), example(3, "blue", "colour"), example(4, "x")]
    result = score(examples, ["red", "2", "green", "x"])
    assert (result.accuracy, result.n, result.correct) == (0.75, 4, 3)
    assert result.by_type == {"colour": 0.5, "count": 1.0}
    assert result.ci95[0] < 0.75 < result.ci95[1]


def test_evaluate_takes_any_function_that_answers() -> None:
    examples = [example(number, "yes" if number % 2 else "no") for number in range(50)]
    asked: list[int] = []

    def always_yes(batch: object) -> list[str]:
        asked.append(len(batch))  # type: ignore[arg-type]
        return ["Yes."] * len(batch)  # type: ignore[arg-type]

    result = evaluate(always_yes, examples, batch_size=4)
    assert (result.correct, sum(asked)) == (25, 50)


def test_a_row_without_an_answer_is_named_before_anything_is_asked() -> None:
    bad = Example("b7", (), Conversation(turns=(Turn("user", "?"),)), "test.json, example 7", None)
    with pytest.raises(InputError, match=r"test\.json, example 7, id b7"):
        evaluate(lambda _: pytest.fail("asked"), [example(1, "x"), bad])


def test_a_file_from_end_to_end(tmp_path: Path) -> None:
    model = make_tiny_llava(tmp_path / "model")
    make_image("red").save(tmp_path / "red.png")
    truth = load(str(model)).answer(tmp_path / "red.png", "What colour?", max_new_tokens=64)
    rows = [
        {"question": "What colour?", "image": "red.png", "answer": truth, "type": "colour"},
        {"question": "How many?", "image": "red.png", "answer": "certainly not this", "type": "count"},
    ]
    data, out, html = tmp_path / "data.json", tmp_path / "out.jsonl", tmp_path / "failures.html"
    data.write_text(json.dumps(rows))
    result = evaluate_file(str(model), data, image_folder=tmp_path, out=out, html=html)
    assert set(result) == {"accuracy", "n", "correct", "ci95", "by_type", "by_type_ci95"}
    assert (result["accuracy"], result["n"], result["by_type"]) == (0.5, 2, {"colour": 1.0, "count": 0.0})
    json.dumps(result)
    first, second = [json.loads(line) for line in out.read_text().splitlines()]
    assert (first["question"], first["answer"], first["correct"]) == ("What colour?", truth, True)
    assert (second["truth"], second["correct"], second["type"]) == ("certainly not this", False, "count")
    page = html.read_text()
    assert page.count("<article") == 1 and "certainly not this" in page and "data:image/png" in page  # the one failure
    assert "All failures" in page and "<svg" in page


def test_batches_are_bounded_and_halved_when_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_llava(tmp_path / "model")
    make_image("red").save(tmp_path / "red.png")
    rows = [{"id": f"q{i}", "question": "What?" + " Why?" * i, "image": "red.png", "answer": "x"} for i in range(10)]
    data, out = tmp_path / "data.json", tmp_path / "out.jsonl"
    data.write_text(json.dumps(rows))
    evaluate_file(str(model), data, out=out)
    expected = out.read_text()
    sizes = small_memory(monkeypatch, 100)
    evaluate_file(str(model), data, out=out, batch_size=4)
    # Two windows of two batches.
    assert sizes == [4, 4, 2] and out.read_text() == expected
    sizes = small_memory(monkeypatch, 3)
    evaluate_file(str(model), data, out=out, batch_size=4)
    assert sizes == [4, 2, 2, 2, 2, 2] and out.read_text() == expected
    small_memory(monkeypatch, 0)
    with pytest.raises(InputError, match=r"answer the question at .*data\.json, example 10, id q9 of \d+ tokens"):
        evaluate_file(str(model), data, out=out)


def test_a_row_that_cannot_be_asked_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no image")
    rows = [{"id": "q9", "question": "What?", "image": "broken.png", "answer": "x"}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"data\.json, example 1, id q9: .*broken\.png"):
        evaluate_file(str(make_tiny_llava(tmp_path / "model")), tmp_path / "data.json")


def test_a_question_that_does_not_fit_is_named(tmp_path: Path) -> None:
    model = make_tiny_llava(tmp_path / "model", context=128)
    rows = [{"id": "ok", "question": "?", "answer": "x"}, {"id": "long", "question": "word " * 60, "answer": "x"}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    with pytest.raises(
        InputError, match=r"data\.json, .*id long: the question has \d+ tokens .* the 128 of this model"
    ):
        evaluate_file(str(model), tmp_path / "data.json")


def test_a_page_of_many_failures_shows_some() -> None:
    examples = [example(number, "yes") for number in range(500)]
    page = failures_page(examples, score(examples, ["no"] * 500), "title", "note")
    assert page.count("<article") == 167 and "167 of 500 failures, evenly spaced" in page
    perfect = failures_page(examples, score(examples, ["yes"] * 500), "title", "note")
    assert perfect.count("<article") == 0


def test_an_out_that_cannot_be_written_is_noticed_first(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"question": "?", "answer": "x"}]))
    with pytest.raises(InputError, match=r"missing/out\.jsonl cannot be written"):
        evaluate_file("no/such/model", data, out=tmp_path / "missing" / "out.jsonl")


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("The answer is red. There is a red circle.", "red"),
        ("There is a red circle. The answer is red.", "red"),
        ("There is a red circle.", None),
        ("The answer is red. The answer is blue.", None),
        ("", None),
    ],
)
def test_an_answer_is_read_from_its_reasons_once_or_not_at_all(said: str, read: str | None) -> None:
    assert read_answer(reader(r"The answer is ([^.]+)\."), said) == read


def test_what_cannot_be_read_is_counted_and_wrong(tmp_path: Path) -> None:
    model, data, out = make_tiny_llava(tmp_path / "model"), tmp_path / "data.json", tmp_path / "out.jsonl"
    data.write_text(json.dumps([{"question": "?", "answer": "x"}, {"question": "How?", "answer": "y"}]))
    result = evaluate_file(str(model), data, out=out, read="(no model says this)")
    assert (result["unread"], result["correct"], result["n"]) == (2, 0, 2)
    assert all(json.loads(line)["answer"] == "" for line in out.read_text().splitlines())
    assert "unread" not in evaluate_file(str(model), data)


@pytest.mark.parametrize("pattern", ["(", "no group", "(two)(groups)"])
def test_a_pattern_that_reads_nothing_is_refused_first(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(InputError, match="--read"):
        evaluate_file("no/such/model", tmp_path / "missing.json", read=pattern)
