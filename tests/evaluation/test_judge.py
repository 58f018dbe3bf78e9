"""LLaVA-Bench's protocol: what a judge's failures, its favourite place and its scale do to a score."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllava import cli
from qllava.config import InputError
from qllava.data.contexts import read_contexts
from qllava.evaluation.asking import Judge, json_object
from qllava.evaluation.judge import Case, JudgeResult, judge_files, rate, read_cases, read_scores
from tests.evaluation.made_up import write_bench
from tests.llm.server import ChatServer, Request, Said


def words(asked: Request) -> tuple[str, str]:
    """The two answers that the judge is shown."""
    first, second = re.split(r"\[First answer\]\n|\n\n\[Second answer\]\n", asked.last)[1:]
    return first, second


def by_length(answer: str) -> float:
    """A consistent scale: a longer answer gets more, from 1 to 10."""
    return min(10.0, 1 + len(answer) / 60)


def consistent(asked: Request) -> str:
    first, second = words(asked)
    return json.dumps({"first": by_length(first), "second": by_length(second), "reason": "by length"})


def fails(asked: Request) -> bool:
    """About one reply in ten, by its content."""
    return int(hashlib.sha256(asked.last.encode()).hexdigest(), 16) % 10 == 0


def failing(asked: Request) -> Said:
    return Said("Both are fine, I should say." if fails(asked) else consistent(asked))


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ('{"first": 8, "second": 7}', (8, 7)),
        ('```json\n{"reason": "so {and} so", "second": 7.5, "first": 1}\n```', (1, 7.5)),
        ("8 7", (8, 7)),
        ("8.5, 10\nThe first is ...", (8.5, 10)),
        ("", None),
        ("8", None),
        ("8 7 6", None),
        ("8, 7", (8, 7)),
        ("8 , 7", (8, 7)),
        ("8/10 7.5/10", (8, 7.5)),
        ("8 out of 10, 10 out of 10", (8, 10)),
        ("8/10, 7", (8, 7)),
        ("8/10", None),
        ("8 / 10", None),
        ("8/7", None),
        ("8 out of 10", None),
        ("8/10\n7/10", None),
        ("Score: 8", None),
        ("8-9", None),
        ("8 - 9", None),
        ("8,5", None),
        ("9. 7", None),
        ("9.7", None),
        ('{"first": "8/10", "second": "7/10"}', None),
        ("The scores are 8 and 7.", None),
        ('{"first": 8}', None),
        ('{"first": 11, "second": 7}', None),
        ('{"first": 0, "second": 7}', None),
        ('{"first": "8", "second": 7}', None),
        ('{"first": true, "second": 7}', None),
        ('{"first": NaN, "second": 7}', None),
        ('{"first": 8, "second": 7} {"first": 7, "second": 8}', None),
        ("-1 -1", None),
    ],
)
def test_scores_are_read_or_not(text: str, scores: tuple[float, float] | None) -> None:
    assert read_scores(text) == scores


@given(st.text(alphabet='{}[]":,firstecond0123456789. \n'))
def test_whatever_a_judge_says_is_read_or_not(text: str) -> None:
    scores = read_scores(text)
    assert scores is None or all(1 <= score <= 10 for score in scores)
    json_object("{" * 3000 + text, {"first"})


def case(number: int, reference: str, answer: str, category: str = "conv", image: str | None = None) -> Case:
    return Case(str(number), f"Question {number}?", category, image, "", reference, answer)


def judged(cases: list[Case], says: Any, tmp_path: Path) -> JudgeResult:
    with ChatServer(lambda asked: Said(says(asked))) as server:
        return rate(cases, Judge("scripted", server.url, tmp_path / "calls.jsonl"))


def test_the_relative_score_by_hand(tmp_path: Path) -> None:
    scale = {"good": 8, "bad": 2, "best": 10}

    def says(asked: Request) -> str:
        return " ".join(str(scale[answer]) for answer in words(asked))

    cases = [case(1, "good", "bad"), case(2, "good", "best"), case(3, "best", "best", "detail")]
    found = judged(cases, says, tmp_path)
    assert found.total.relative.value == pytest.approx(100 * (2 + 10 + 10) / (8 + 8 + 10))
    assert found.categories["conv"].relative.value == pytest.approx(100 * 12 / 16)
    assert found.categories["detail"].relative.value == 100.0
    assert found.categories["detail"].relative.ci95 is None  # one question gives no interval
    assert found.first_place.value == 0.0 and found.failed == 0


def test_a_judge_that_favours_the_first_place_is_found_and_evened_out(tmp_path: Path) -> None:
    def says(asked: Request) -> str:
        first, second = (3 if answer == "bad" else 6 for answer in words(asked))
        return json.dumps({"first": first + 2, "second": second})

    found = judged([case(n, "good", "bad") for n in range(8)], says, tmp_path)
    assert found.first_place.value == pytest.approx(2.0)
    assert found.total.relative.value == pytest.approx(100 * 4 / 7)


def test_a_failed_reply_is_counted_and_moves_nothing(tmp_path: Path) -> None:
    def says(asked: Request) -> str:
        return (
            "no"
            if "Question 1?" in asked.last and words(asked)[0] == "good"
            else "8 4"[:: 1 if words(asked)[0] == "good" else -1]
        )

    found = judged([case(n, "good", "bad") for n in range(4)], says, tmp_path)
    assert (found.failed, found.one_order, found.left_out, found.total.n) == (1, 1, 0, 4)
    assert found.total.relative.value == 50.0 and found.first_place.value == 0.0
    nothing = judged([case(9, "good", "bad")], lambda asked: "no", tmp_path)
    assert nothing.total.relative.value is None and (nothing.failed, nothing.left_out) == (2, 1)
    assert nothing.total.to_json()["undefined"] == "there are no items to count"
    json.dumps(nothing.to_json())
    assert "undefined" in nothing.text()


class TestLlavaBench:
    """The 90 questions with GPT-4's reference answers, over HTTP, with a judge that fails in a tenth of its replies."""

    @pytest.fixture(params=["made up", "real"])
    def files(self, request: pytest.FixtureRequest, coco_contexts: Path, tmp_path: Path) -> dict[str, Path]:
        """Questions and reference answers: made up, and LLaVA-Bench's where they are there."""
        if request.param == "made up":
            return {**write_bench(read_contexts(coco_contexts), tmp_path), "contexts": coco_contexts}
        real = request.getfixturevalue("shared_data")
        names = {"questions": "llava_bench_coco_questions.jsonl", "reference": "llava_bench_coco_reference.jsonl"}
        return {**{key: real / name for key, name in names.items()}, "contexts": coco_contexts}

    def test_the_references_themselves_have_100(self, files: dict[str, Path], tmp_path: Path) -> None:
        with ChatServer(failing) as server:
            judge = Judge("scripted", server.url, tmp_path / "calls.jsonl")
            found = judge_files(
                files["questions"],
                files["reference"],
                files["reference"],
                files["contexts"],
                judge,
                tmp_path / "j.jsonl",
            )
        assert found.total.relative.value == pytest.approx(100.0)
        assert found.total.relative.ci95 == pytest.approx((100.0, 100.0))
        assert set(found.categories) == {"conv", "detail", "complex"}
        for scores in found.categories.values():
            assert scores.relative.value == pytest.approx(100.0)
        # Both orders read alike here, so a failure takes both of a question's replies.
        assert 0 < found.failed == 2 * found.left_out and found.total.n == 90 - found.left_out
        assert found.one_order == 0
        assert found.without_context == 45  # 15 of the 30 images are among the contexts

    def test_shortened_answers_lose_what_they_lose(self, files: dict[str, Path], tmp_path: Path) -> None:
        rows = [json.loads(line) for line in files["reference"].read_text().splitlines()]
        short = {str(row["question_id"]): row["text"][: len(row["text"]) // 2] for row in rows}
        answers = tmp_path / "short.jsonl"
        answers.write_text("".join(json.dumps({"question_id": i, "text": text}) + "\n" for i, text in short.items()))
        arguments = (files["questions"], files["reference"], answers, files["contexts"])

        def run(says: Any, name: str) -> JudgeResult:
            with ChatServer(says) as server:
                judge = Judge(name, server.url, tmp_path / "calls.jsonl")
                return judge_files(*arguments, judge, tmp_path / f"{name}.jsonl")

        whole = run(lambda asked: Said(consistent(asked)), "sound")
        found = run(failing, "failing")
        failed = {rating.case.id for rating in found.ratings if rating.scores is None}
        assert whole.failed == 0 and 5 < found.failed < 40
        assert found.left_out == len(failed) and found.one_order + 2 * found.left_out == found.failed
        for sound, mine in zip(whole.ratings, found.ratings, strict=True):
            assert mine.scores is None or mine.scores == pytest.approx(sound.scores)
        if not failed:  # no question lost both orders, so no figure has moved at all
            assert found.total.relative.value == pytest.approx(whole.total.relative.value)
        # The score once more, plainly.
        for category in ("conv", "detail", "complex"):
            kept = [row for row in rows if row["category"] == category and str(row["question_id"]) not in failed]
            mine, theirs = (
                sum(by_length(text) for text in texts)
                for texts in ([short[str(row["question_id"])] for row in kept], [row["text"] for row in kept])
            )
            assert found.categories[category].relative.value == pytest.approx(100 * mine / theirs)
            assert found.categories[category].n == len(kept)
        interval = found.total.relative.ci95
        assert interval is not None and found.total.relative.value is not None
        assert interval[0] < found.total.relative.value < interval[1] < 100
        lines = [json.loads(line) for line in (tmp_path / "failing.jsonl").read_text().splitlines()]
        assert len(lines) == 180 and sum(line["answer"] is None for line in lines) == found.failed
        assert all(line["reply"] and line["judge"] == "failing" for line in lines)

    def test_nothing_is_asked_twice_and_the_judge_reads_the_context(
        self, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = ["eval", "judge", "--judge", "scripted", "--out", str(tmp_path / "j.jsonl")]
        line += [part for name, path in files.items() for part in (f"--{name}", str(path))]
        line += ["--answers", str(files["reference"]), "--store", str(tmp_path / "calls.jsonl")]
        with ChatServer(lambda asked: Said(consistent(asked))) as server:
            assert cli.main([*line, "--base-url", server.url, "--json"]) == 0
            asked = len(server.requests)
            found = json.loads(capsys.readouterr().out)
            assert cli.main([*line, "--base-url", server.url]) == 0
            assert len(server.requests) == asked == found["judge"]["asked_now"]
        said = capsys.readouterr().out
        assert "all             100.0" in said and "For 45 questions" in said
        assert found["relative_score"] == pytest.approx(100) and found["n"] == 90 and found["failed"] == 0
        assert set(found["by_category"]) == {"conv", "detail", "complex"}
        assert found["judge"]["name"] == "scripted" and found["judge"]["parameters"]["temperature"] == 0.0
        assert found["judge"]["prompt_tokens"] > 1000
        with_context = [request.last for request in server.requests if "[Context]" in request.last]
        assert len(with_context) == 45 and all(re.search(r": \[0\.\d{3}, ", text) for text in with_context[:5])


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_does_not_belong_together_is_named(tmp_path: Path) -> None:
    questions = write(tmp_path / "q.jsonl", [{"question_id": n, "text": "What?"} for n in (1, 2)])
    both = write(tmp_path / "r.jsonl", [{"question_id": n, "text": "A dog."} for n in (1, 2)])
    one = write(tmp_path / "a.jsonl", [{"question_id": 1, "text": "A dog."}])
    with pytest.raises(InputError, match=r"a\.jsonl has no answer to question 2"):
        read_cases(questions, both, one, None)
    with pytest.raises(InputError, match=r"a\.jsonl has no reference to question 2"):
        read_cases(questions, one, both, None)
    cases = read_cases(questions, both, both, None)
    assert [(found.category, found.image, found.context) for found in cases] == [("all", None, "")] * 2
    twice = write(tmp_path / "t.jsonl", [{"question_id": 1, "text": "What?"}] * 2)
    with pytest.raises(InputError, match="another question has the same id"):
        read_cases(twice, both, both, None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--questions q", "--judge is missing"),
        ("--questions q --judge j", "--questions needs --answers"),
        ("--votes v --judge j --answers a", "need --questions"),
        ("--questions q --answers a --reference r --judge j --pictures p", "--pictures needs --votes"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "qvar":
        Path(name).touch()  # files are looked at before flags
    Path("p").mkdir()
    assert cli.main(["eval", "judge", "--out", "j.jsonl", *flags.split()]) == 1
    assert said in capsys.readouterr().err


def test_a_name_at_another_server_is_another_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def key(base_url: str | None) -> str:
        return Judge("default", base_url).call("Judge.", "this").key

    here, there, hosted = key("http://127.0.0.1:8000/v1"), key("http://127.0.0.1:8001/v1"), key(None)
    assert len({here, there, hosted}) == 3
    assert key("http://me:secret@127.0.0.1:8000/v1/") == key("http://***@127.0.0.1:8000/v1")
    assert key("https://api.openai.com/v1") == hosted
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:8001/v1")
    assert key(None) == there
