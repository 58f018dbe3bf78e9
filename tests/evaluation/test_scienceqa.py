"""ScienceQA: the papers' three rules and nothing else, their figures on real answers, and generation that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qllava import cli
from qllava.config import InputError
from qllava.data.formats import read_examples
from qllava.evaluation import scienceqa
from qllava.evaluation.scienceqa import (
    Order,
    answer_problems,
    read_letter,
    read_problems,
    score,
    score_file,
    training_records,
)
from recipes.scienceqa import write_records
from tests.evaluation.made_up import NAMES, write_science
from tests.tiny_models import make_image, make_tiny_llava

ROW = {
    "question": "What is the capital of Delaware?",
    "choices": ["Montpelier", "Trenton", "Dover"],
    "answer": 2,
    "hint": "",
    "image": None,
    "subject": "social science",
    "grade": "grade3",
    "split": "test",
}


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Four problems, two with images, and one of another split."""
    rows = {
        "1": ROW,
        "2": {**ROW, "image": "image.png", "subject": "natural science", "grade": "grade7", "answer": 0},
        "3": {**ROW, "hint": "Think.", "image": "image.png", "subject": "language science", "grade": "grade6"},
        "4": {**ROW, "hint": "Think.", "grade": "grade12"},
        "5": {**ROW, "split": "train"},
    }
    for id in ("2", "3"):
        (tmp_path / "pictures" / id).mkdir(parents=True)
        make_image("red").save(tmp_path / "pictures" / id / "image.png")
    path = tmp_path / "problems.json"
    path.write_text(json.dumps(rows))
    return path


def oracle(text: str) -> str | None:
    """The three rules once more, character by character, without a regular expression."""
    for letter in "ABCDE":
        if text == letter or text.startswith(letter + ". "):
            return letter
    words, stated, at = "The answer is ", [], 0
    while (at := text.find(words, at)) >= 0:
        letter, behind = text[at + len(words) :][:1], text[at + len(words) + 1 :][:1]
        found = "A" <= letter <= "Z" and behind not in ("", "\n")
        stated += [letter] if found else []
        at += len(words) + 2 if found else 1
    return stated[0] if len(stated) == 1 else None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("C.", None),
        ("C. Dover", "C"),
        ("F. x", None),
        (" C", None),
        ("(C)", None),
        ("The answer is C.", "C"),
        ("The answer is C", None),
        ("The answer is C\n", None),
        ("The answer is C, because it is.", "C"),
        ("The answer is C because it is.", "C"),
        ("The answer is (C).", None),
        ("The answer is Dover.", "D"),
        ("The answer is Dover. The answer is C.", None),
        ("The answer is C. The answer is C.", None),
        ("The answer is BThe answer is C.", "B"),
        ("the answer is C.", None),
        ("It is so. The answer is F.", "F"),
        ("The answer is  C.", None),
    ],
)
def test_letters_are_those_of_the_released_scorer(text: str, letter: str | None) -> None:
    # What the released scorer gives for these texts; it was run by itself, and is not part of qllava.
    assert read_letter(text) == letter


PIECES = [
    "The answer is ",
    "the answer is ",
    "A",
    "B",
    "E",
    "F",
    "Z",
    "\u0410",
    ".",
    ". ",
    " ",
    "\n",
    "(C)",
    "answer",
    "C.",
]


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join)))
@example("The answer is A. The answer is A.")
@example("The answer is B")
@example("The answer is BThe answer is C.")
@example("A.")
@example(" A")
def test_no_letter_is_read_outside_the_three_rules(text: str) -> None:
    assert read_letter(text) == oracle(text)


@given(st.dictionaries(st.sampled_from("1234"), st.text()))
def test_whatever_is_answered_is_counted(answers: dict[str, str]) -> None:
    asked = [scienceqa._problem(id, ROW, Path("p.json")) for id in "1234"]
    result = score(asked, answers)
    assert result.total.n == 4
    assert result.total.count + result.unparsed <= 4
    assert result.unanswered == 4 - len(answers)
    json.dumps(result.to_json())


@pytest.fixture(params=["made up", "real"])
def answered(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of problems, answers and their counts: made up, and the released ones where they are there."""
    return request.getfixturevalue("shared_data") / "scienceqa" if request.param == "real" else write_science(tmp_path)


@pytest.mark.parametrize("whose", NAMES)
def test_answers_get_the_figures_that_were_counted(whose: str, answered: Path) -> None:
    """Of the released answers those of the papers' own scorer, of the made-up ones those of who made them up."""
    folder = answered
    expected = json.loads((folder / "expected.json").read_text())
    found = score_file(folder / "problems.json", folder / f"{whose}.jsonl").to_json()
    assert (found["n"], found["n_image"]) == (expected["n"], expected["n_image"])
    assert found["correct"] == expected["correct"][whose]
    assert found["correct_image"] == expected["correct_image"][whose]
    assert found["unparsed"] == expected["unparsed"][whose]
    groups = found["groups"]
    for partition in (("NAT", "SOC", "LAN"), ("G1-6", "G7-12")):
        assert sum(groups[name]["n"] for name in partition) == expected["n"]
        assert sum(groups[name]["correct"] for name in partition) == expected["correct"][whose]


def test_groups(problems: Path) -> None:
    answers = {"1": "C", "2": "The answer is A.", "3": "B", "4": "", "5": "C"}
    result = score(read_problems(problems), answers)
    assert (result.total.count, result.total.n) == (2, 4)
    assert (result.with_image.count, result.with_image.n) == (1, 2)
    assert {name: (share.count, share.n) for name, share in result.groups.items()} == {
        "NAT": (1, 1), "SOC": (1, 2), "LAN": (0, 1), "TXT": (0, 2), "IMG": (1, 2), "NO": (1, 1),
        "G1-6": (1, 2), "G7-12": (1, 2),
    }  # fmt: skip
    assert (result.unparsed, result.unanswered, result.not_a_choice) == (1, 0, 0)
    assert score(read_problems(problems), {"1": "E"}).not_a_choice == 1
    only_train = score(read_problems(problems, "train"), answers)
    assert only_train.total.value == 1.0 and only_train.with_image.value is None
    found = only_train.to_json()
    assert found["accuracy_image"] is None and found["ci95_image"] is None
    assert found["undefined"]["accuracy_image"] == "none of the problems has an image"
    assert set(score([], {}).to_json()["undefined"]) == {"accuracy", "ci95", "accuracy_image", "ci95_image"}
    assert "undefined" not in result.to_json() and "undefined: none of" in only_train.text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choices": "A"}, "expected a list of texts under 'choices'"),
        ({"choices": ["only"], "answer": 0}, "1 choices"),
        ({"answer": 3}, "'answer' must be"),
        ({"answer": True}, "'answer' must be"),
        ({"image": "../../secret.png"}, "'image' must be"),
        ({"subject": "magic"}, "the subject is 'magic'"),
        ({"grade": "grade13"}, "the grade is 'grade13'"),
        ({"hint": None}, "a text under 'hint'"),
    ],
)
def test_a_problem_that_cannot_be_asked_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"77": {**ROW, **change}}))
    with pytest.raises(InputError, match=f"problem 77: .*{said}"):
        read_problems(path)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"question_id": "1", "text": "C"}\n{"question_id": 1, "text": "C"}', "line 2, id 1: .*already answers"),
        ('{"question_id": "1"}', "'text' contains no text"),
        ('{"text": "C"}', "no question_id"),
        ('{"question_id": "1", "te', "not valid JSON"),
        ('{"question_id": "9", "text": "C"}', "answers none of the 4 problems"),
        ("", "has no answers"),
    ],
)
def test_answers_that_cannot_be_used(lines: str, said: str, problems: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(InputError, match=said):
        score_file(problems, tmp_path / "a.jsonl")


@pytest.fixture
def answering(problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Ask a tiny model, whose answers are cut after a few tokens."""
    monkeypatch.setattr(scienceqa, "REASON_TOKENS", 8)
    model = str(make_tiny_llava(tmp_path / "model", context=512))

    def run(order: str = "reason-first", batch_size: int = 2) -> Any:
        return answer_problems(
            model, problems, tmp_path / "pictures", tmp_path / "out.jsonl", order, batch_size=batch_size
        )  # type: ignore[arg-type]

    return run


def test_generation_goes_on_where_it_was_interrupted(answering: Callable[..., Any], tmp_path: Path) -> None:
    whole = answering()
    out = tmp_path / "out.jsonl"
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    out.write_bytes(lines[0] + lines[1][:-30])  # killed while it wrote the second line
    again = answering(batch_size=1)
    assert out.read_bytes().splitlines(keepends=True)[0] == lines[0]
    assert {json.loads(line)["question_id"] for line in out.read_text().splitlines()} == set("1234")
    assert sorted(out.read_bytes().splitlines()) == sorted(line.rstrip() for line in lines)  # batched equals single
    assert again == whole
    before = out.read_bytes()
    answering()
    assert out.read_bytes() == before


def test_answers_of_another_run_are_not_continued(
    answering: Callable[..., Any], problems: Path, tmp_path: Path
) -> None:
    answering()
    out = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match=r"out\.jsonl, line 1: .*order answer-first.*another file"):
        answering("answer-first")
    whole = out.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    for key, said in (("fingerprint", "does not say which model"), ("asked", "had another text")):
        without = [{name: value for name, value in row.items() if name != key} for row in rows]
        out.write_text("".join(json.dumps(row) + "\n" for row in without))  # as an older qllava wrote it
        with pytest.raises(InputError, match=f"line 1: .*{said}.*; give another file for --out"):
            answering()
    out.write_text(whole)
    make_image("blue").save(tmp_path / "pictures" / "3" / "image.png")
    with pytest.raises(InputError, match="question 3 had another text or another image when it was answered"):
        answering()
    out.write_text(whole)
    for foreign in ("precious text without a line's end", '{"question_id": "1", "text": "C"}\n', "no json\n"):
        out.write_text(foreign)
        with pytest.raises(InputError, match="another file for --out"):
            answering()
        assert out.read_text() == foreign


def test_another_model_behind_the_same_path_is_noticed(answering: Callable[..., Any], tmp_path: Path) -> None:
    answering()
    before = (tmp_path / "out.jsonl").read_bytes()
    make_tiny_llava(tmp_path / "model", seed=1)
    with pytest.raises(
        InputError, match=r"line 1: another model gave this answer \(fingerprint .*another file for --out"
    ):
        answering()
    assert (tmp_path / "out.jsonl").read_bytes() == before
    make_tiny_llava(tmp_path / "model", seed=0)
    (tmp_path / "model").rename(tmp_path / "moved")
    (tmp_path / "model").symlink_to("moved")
    answering()  # the same model, wherever it is
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_the_prompt_of_each_order(problems: Path) -> None:
    problem = read_problems(problems)[0]
    first, last = problem.prompt("answer-first"), problem.prompt("reason-first")
    assert first.splitlines()[:3] == last.splitlines()[:3]
    assert "Options: (A) Montpelier (B) Trenton (C) Dover" in first and "Context: N/A" in first
    assert first.splitlines()[3].startswith("Begin with") and last.splitlines()[3].startswith("Reason first")


def test_a_missing_image_is_noticed_before_the_model_is_loaded(problems: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "3" / "image.png").unlink()
    with pytest.raises(InputError, match="Problem 3: the image .*does not exist"):
        answer_problems("no/such/model", problems, tmp_path / "pictures", tmp_path / "out.jsonl", "reason-first")
    with pytest.raises(InputError, match="--image-folder"):
        answer_problems("no/such/model", problems, None, tmp_path / "out.jsonl", "reason-first")


def test_the_command(problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"question_id": "1", "text": "C"}\n{"question_id": 2, "text": "B"}\n')
    line = ["eval", "scienceqa", "--problems", str(problems), "--answers", str(tmp_path / "a.jsonl")]
    assert cli.main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == 0.25 and found["unparsed"] == found["unanswered"] == 2
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert "2 of 4 answers could not be read" in said and "25.0 %  (1 of 4" in said
    assert cli.main(["eval", "scienceqa", "--problems", str(problems), "--model", "m"]) == 1
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", "scienceqa", "--problems", str(problems)])
    assert end.value.code == 2


@pytest.mark.parametrize("order", ["answer-first", "reason-first"])
def test_what_is_learned_is_read_as_right_and_asked_as_in_the_evaluation(order: Order, problems: Path) -> None:
    rows = json.loads(problems.read_text())
    rows["1"] |= {"lecture": "States have capitals.", "solution": "Dover is the one of Delaware."}
    problems.write_text(json.dumps(rows))
    asked = read_problems(problems)
    found = training_records(asked, problems.parent / "pictures", order)
    answers = {row["id"]: row["conversations"][1]["value"] for row in found}
    assert score(asked, answers).total.value == 1 and score(asked, answers).unparsed == 0
    reason, answer = "States have capitals. Dover is the one of Delaware.", "The answer is C."
    assert answers["1"] == (f"{answer} {reason}" if order == "answer-first" else f"{reason} {answer}")
    assert answers["4"] == answer
    for problem, row in zip(asked, found, strict=True):
        mark = "<image>\n" if problem.image else ""
        assert row["conversations"][0]["value"] == mark + problem.prompt(order)
        assert ("image" in row) == (problem.image is not None)


def test_the_recipe_writes_both_orders_as_rows_that_can_be_read(problems: Path, tmp_path: Path) -> None:
    write_records(problems, tmp_path / "pictures", "test", tmp_path / "rows")
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == ["answer-first.json", "reason-first.json"]
    examples = read_examples(tmp_path / "rows" / "reason-first.json", tmp_path / "pictures")
    assert len(examples) == 4 and sum(len(one.images) for one in examples) == 2
    with pytest.raises(InputError, match="no problems of the split"):
        write_records(problems, tmp_path / "pictures", "validation", tmp_path / "none")
    assert not (tmp_path / "none").exists()
