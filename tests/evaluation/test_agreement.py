"""Agreement: equal to scipy and scikit-learn, and to the truth of cases that were built to have one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from qllava import cli
from qllava.config import InputError
from qllava.evaluation.agreement import Report, compare, kappa, measure
from qllava.evaluation.judgments import ORDERS, Judgment, read_judgments
from qllava.voting.votes import VERDICTS, Side, Verdict, Vote, read_votes

MIRROR: dict[Verdict, Verdict] = {"left": "right", "right": "left", "tie": "tie", "both_bad": "both_bad"}


def random_votes(n: int = 200, seed: int = 0, verdicts: tuple[Verdict, ...] = VERDICTS) -> list[Vote]:
    random = np.random.default_rng(seed)
    return [
        Vote(
            id=str(i),
            question=f"q{i % (n // 4)}",
            pictures=(),
            answers={"left": "l" * int(random.integers(1, 20)), "right": "r" * int(random.integers(20, 40))},
            vote=verdicts[random.integers(len(verdicts))],
            rater=None,
        )
        for i in range(n)
    ]


def judged(votes: list[Vote], says: Any) -> Report:
    """A judge as a function from vote and order to its verdict."""
    judgments = [Judgment(vote.id, order, says(vote, order), "scripted") for vote in votes for order in ORDERS]
    return compare(votes, judgments, resamples=200)


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_scipy_and_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    a = random.integers(4, size=150)
    b = np.where(random.random(150) < 0.5, a, random.integers(4, size=150))
    found = measure(a, b, range(150), resamples=50)
    order = {"left": -1, "tie": 0, "right": 1, "both_bad": 0}
    x, y = ([order[VERDICTS[code]] for code in codes] for codes in (a, b))
    assert found.agreement.value == pytest.approx(np.mean(a == b))
    assert found.kappa.value == pytest.approx(cohen_kappa_score(a, b))
    assert found.kappa_quadratic.value == pytest.approx(cohen_kappa_score(x, y, weights="quadratic"))
    assert found.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.kendall.value == pytest.approx(stats.kendalltau(x, y).statistic)
    for one in found.measures().values():
        assert one.value is not None and one.ci95 is not None
        assert one.ci95[0] < one.value < one.ci95[1]


def test_a_perfect_judge() -> None:
    found = judged(random_votes(), lambda vote, order: vote.vote)
    for one in found.with_people.measures().values():
        assert one.value == pytest.approx(1.0) and one.ci95 == pytest.approx((1.0, 1.0))
    assert found.inconsistent == 0 and found.consistent.value == 1.0
    assert found.longer_difference.value == 0.0
    assert found.first.value == 0.5


def test_a_judge_that_says_the_reverse() -> None:
    found = judged(random_votes(verdicts=("left", "right")), lambda vote, order: MIRROR[vote.vote]).with_people
    assert found.agreement.value == 0.0
    assert found.kappa.value is not None and found.kappa.value < -0.9
    for one in (found.spearman, found.kendall):
        assert one.value == pytest.approx(-1.0)


def test_a_constant_judge_has_no_correlation() -> None:
    found = judged(random_votes(), lambda vote, order: "tie")
    assert found.with_people.kappa.value == pytest.approx(0.0)  # agrees as often as chance does, and no more
    for one in (found.with_people.spearman, found.with_people.kendall):
        assert one.to_json() == {
            "value": None,
            "ci95": None,
            "undefined": "one of the two always gives the same verdict",
        }
    assert found.first.value is None and found.first.undefined == "the judge never preferred a side"
    assert found.judge_longer.value is None
    always = judged(random_votes(verdicts=("tie",)), lambda vote, order: "tie").with_people
    assert always.agreement.value == 1.0 and always.kappa.value is None
    assert always.kappa.undefined is not None and "chance" in always.kappa.undefined
    json.dumps(found.to_json())


def test_a_judge_that_takes_what_it_sees_first() -> None:
    found = judged(random_votes(), lambda vote, order: order.removesuffix("-first"))
    assert found.first.value == 1.0 and found.consistent.value == 0.0
    assert found.inconsistent == found.with_people.n == 200
    assert sum(row[VERDICTS.index("tie")] for row in found.table) == 200  # none of it passes for a verdict


def left_is_longer(vote: Vote) -> bool:
    return len(vote.answers["left"]) > len(vote.answers["right"])


def test_a_judge_that_takes_the_longer_answer() -> None:
    votes = [
        replace(vote, answers={"left": vote.answers["right"], "right": vote.answers["left"]}) if i % 2 else vote
        for i, vote in enumerate(random_votes())
    ]
    found = judged(votes, lambda vote, order: "left" if left_is_longer(vote) else "right")
    assert found.judge_longer.value == 1.0 and found.first.value == 0.5
    by_hand = [(vote.vote == "left") == left_is_longer(vote) for vote in votes if vote.vote in ("left", "right")]
    assert found.people_longer.value == pytest.approx(np.mean(by_hand))
    assert found.longer_difference.value == pytest.approx(1 - np.mean(by_hand))
    assert found.longer_difference.ci95 is not None and found.longer_difference.ci95[0] > 0


def test_what_could_not_be_read_is_left_out_and_counted() -> None:
    votes = random_votes(8, verdicts=("left", "right"))
    judgments = [Judgment(vote.id, order, vote.vote, "j") for vote in votes for order in ORDERS]
    judgments[1] = replace(judgments[1], vote=None)  # vote 0: one order unread
    del judgments[2]  # vote 1: one order missing
    del judgments[-2:]  # vote 7: not judged
    found = compare(votes, judgments, resamples=50)
    assert (found.unread, found.unjudged, found.with_people.n) == (1, 2, 5)
    assert found.with_people.agreement.value == 1.0
    nothing = compare(votes, [Judgment("0", "left-first", None, "j")], resamples=50)
    assert nothing.with_people.n == 0 and nothing.with_people.agreement.value is None
    json.dumps(nothing.to_json())


def test_people_are_the_ceiling_whichever_side_the_answers_stood_on() -> None:
    def vote(id: str, rater: str | None, says: Verdict, swapped: bool = False, question: str = "q") -> Vote:
        answers: dict[Side, str] = {"left": "b", "right": "a"} if swapped else {"left": "a", "right": "b"}
        return Vote(id=id, question=question, pictures=("hash",), answers=answers, vote=says, rater=rater)

    votes = [
        vote("1", "ann", "left"),
        vote("2", "bob", "right", swapped=True),  # the same answer as ann's
        vote("3", "eve", "right"),  # the other one
        vote("4", "eve", "tie"),  # no: eve thought again
        vote("5", None, "left"),  # nobody in particular
        vote("6", "ann", "left", question="another"),
        vote("7", "bob", "left", question="another"),
        replace(vote("8", "bob", "left"), pictures=("another",)),
    ]
    found = judged(votes, lambda vote, order: vote.vote).people
    assert found.n == 4  # ann-bob, ann-eve, bob-eve; ann-bob on another question
    assert found.agreement.value == 0.5
    assert judged(votes[:1], lambda vote, order: "left").people.n == 0


def test_kappa_of_the_books() -> None:
    """Cohen's own figures: 2 x 2 with 20, 5, 10, 15 has 0.4."""
    a = np.repeat([0, 0, 1, 1], [20, 5, 10, 15])
    b = np.repeat([0, 1, 0, 1], [20, 5, 10, 15])
    assert kappa(a, b) == pytest.approx(0.4)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROW = {
    "id": "v1",
    "time": "2026-11-23T10:00:00Z",
    "question": "What is it?",
    "pictures": ["abc"],
    "answers": {"left": "A dog.", "right": "A large brown dog."},
    "models": {"left": "m1", "right": "m2"},
    "vote": "left",
    "rater": "ann",
    "seed": 3,
    "conversation": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}],
}


def test_votes_are_read_as_the_demo_writes_them(tmp_path: Path) -> None:
    (vote,) = read_votes(write(tmp_path / "v.jsonl", [ROW]))
    assert (vote.id, vote.answers["left"], vote.vote, vote.rater, vote.pictures) == (
        "v1",
        "A dog.",
        "left",
        "ann",
        ("abc",),
    )
    later = {**ROW, "id": "v2", "conversation": None, "rater": None}
    (_, other) = read_votes(write(tmp_path / "v.jsonl", [ROW, later]))
    assert other.rater is None and other.asked != vote.asked


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vote": "up"}, "line 2, id v2: the vote is 'up'; expected left, right, tie or both_bad"),
        ({"answers": None}, "'answers' is not an object"),
        ({"answers": {"left": "x"}}, "'right' contains no text"),
        ({"pictures": "abc"}, "'pictures' is not a list"),
        ({"id": "v1"}, "another vote has this id"),
        ({"id": None}, "the line has no id"),
    ],
)
def test_a_vote_that_is_none_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read_votes(write(tmp_path / "v.jsonl", [ROW, {**ROW, "id": "v2", **change}]))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"id": "1", "order": "first", "vote": "left"}], "the order is 'first'"),
        ([{"id": "1", "order": "left-first"}], "the vote is 'missing'"),
        (
            [{"id": "1", "order": "left-first", "vote": "left", "judge": j} for j in "ab"],
            "already has a judgment for the order",
        ),
        (
            [{"id": i, "order": "left-first", "vote": "left", "judge": i} for i in "ab"],
            "judgments of a and b. Give the judgments of one judge",
        ),
        ([], "has no judgments"),
    ],
)
def test_judgments_that_are_none_are_named(rows: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read_judgments(write(tmp_path / "j.jsonl", rows))


def test_a_judgment_is_read_as_it_is_written(tmp_path: Path) -> None:
    mine = [Judgment("v1", "left-first", None, "judge", "I cannot say."), Judgment("v1", "right-first", "tie", "judge")]
    assert read_judgments(write(tmp_path / "j.jsonl", [one.to_json() for one in mine])) == mine


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    votes = write(
        tmp_path / "v.jsonl", [{**ROW, "id": i, "question": f"q{i % 5}", "vote": VERDICTS[i % 3]} for i in range(20)]
    )
    rows = [Judgment(str(i), order, VERDICTS[i % 2], "scripted").to_json() for i in range(20) for order in ORDERS]
    judgments = write(tmp_path / "j.jsonl", rows)
    html = tmp_path / "page.html"
    line = ["eval", "agreement", "--votes", str(votes), "--judgments", str(judgments)]
    assert cli.main([*line, "--json", "--html", str(html)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 20 and found["judge"] == "scripted"
    for name in ("agreement", "kappa", "kappa_quadratic", "spearman", "kendall"):
        assert set(found[name]) >= {"value", "ci95"}
    assert "<svg" in html.read_text() and "quadratic kappa" in html.read_text()
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert "20 votes on 5 questions, judged by scripted" in said and "Kendall's tau-b" in said
    other = write(tmp_path / "other.jsonl", [Judgment("x", "left-first", "tie", "j").to_json()])
    assert cli.main([*line[:-1], str(other)]) == 1
    assert "has the id of a vote" in capsys.readouterr().err
    assert cli.main([*line, "--html", str(tmp_path / "no" / "page.html")]) == 1
