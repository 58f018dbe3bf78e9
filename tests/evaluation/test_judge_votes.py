"""A judge votes on what people voted on: in both orders, on the right side, with whatever is known of the images."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qllava import cli
from qllava.config import InputError
from qllava.evaluation.asking import Judge
from qllava.evaluation.judge_votes import read_verdict, vote_on_file
from qllava.evaluation.judgments import read_judgments
from qllava.voting.votes import VERDICTS
from tests.llm.server import ChatServer, Request, Said
from tests.tiny_models import make_image


def row(number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"v{number}",
        "question": f"What is in picture {number}?",
        "pictures": [f"hash{number}"],
        "answers": {"left": "short", "right": "a longer answer"},
        "models": {"left": "a", "right": "b"},
        "vote": VERDICTS[number % 3],
        "rater": "ann",
        "seed": 0,
        **more,
    }


@pytest.fixture
def votes(tmp_path: Path) -> Path:
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(6)))
    return path


def longer(asked: Request) -> Said:
    """A consistent judge that takes the longer answer."""
    first, second = re.split(r"\[First answer\]\n|\n\n\[Second answer\]\n", asked.last)[1:]
    return Said(json.dumps({"verdict": "first" if len(first) > len(second) else "second"}))


@pytest.mark.parametrize(
    ("text", "left_first", "right_first"),
    [
        ('{"verdict": "first", "reason": "so"}', "left", "right"),
        ('So: {"verdict": "second"}', "right", "left"),
        ('{"verdict": "tie"}', "tie", "tie"),
        ('{"verdict": "both_bad"}', "both_bad", "both_bad"),
        ('{"verdict": "left"}', None, None),
        ('{"verdict": ["first"]}', None, None),
        ('{"verdict": "first"} {"verdict": "second"}', None, None),
        ("first", None, None),
    ],
)
def test_a_verdict_means_the_side_of_the_vote(text: str, left_first: str | None, right_first: str | None) -> None:
    assert read_verdict(text, "left-first") == left_first
    assert read_verdict(text, "right-first") == right_first


def test_from_votes_to_agreement(votes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "j.jsonl"
    line = ["eval", "judge", "--votes", str(votes), "--judge", "scripted", "--out", str(out)]
    with ChatServer(longer) as server:
        line += ["--base-url", server.url, "--store", str(tmp_path / "calls.jsonl")]
        assert cli.main([*line, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert cli.main(line) == 0
        assert len(server.requests) == 12
    assert (found["n"], found["failed"], found["inconsistent"], found["blind"]) == (6, 0, 0, 6)
    assert found["judge"]["name"] == "scripted"
    assert "judged 6 votes in both orders" in capsys.readouterr().out
    assert {judgment.vote for judgment in read_judgments(out)} == {"right"}
    assert cli.main(["eval", "agreement", "--votes", str(votes), "--judgments", str(out), "--json"]) == 0
    agreement = json.loads(capsys.readouterr().out)
    assert agreement["n"] == 6 and agreement["agreement"]["value"] == pytest.approx(1 / 3)
    assert agreement["spearman"]["value"] is None  # the judge always says right
    assert agreement["position"]["first"]["value"] == 0.5


def test_a_judge_that_takes_the_first_and_one_that_says_nothing(votes: Path, tmp_path: Path) -> None:
    def first(asked: Request) -> Said:
        return Said("Hm." if "picture 5" in asked.last else '{"verdict": "first"}')

    with ChatServer(first) as server:
        judge = Judge("j", server.url, tmp_path / "calls.jsonl")
        found = vote_on_file(votes, judge, tmp_path / "j.jsonl", contexts=None, pictures=None).to_json()
    assert (found["inconsistent"], found["failed"]) == (5, 2)
    assert [one.vote for one in read_judgments(tmp_path / "j.jsonl")][-2:] == [None, None]


def test_images_first_then_captions_then_nothing(tmp_path: Path) -> None:
    votes = tmp_path / "votes.jsonl"
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    said += [{"role": "user", "content": "What is in picture 4?"}]
    rows = [row(0), row(1), row(2), row(3, pictures=[]), row(4, pictures=["hash0", "hash9"], conversation=said)]
    votes.write_text("".join(json.dumps(one) + "\n" for one in rows))
    (tmp_path / "kept").mkdir()
    make_image("red").save(tmp_path / "kept" / "hash0.png")
    contexts = tmp_path / "contexts.jsonl"
    context = [{"id": f"hash{n}", "image": "x.png", "captions": [f"A red square, {n}."], "boxes": []} for n in (0, 1)]
    contexts.write_text("".join(json.dumps(one) + "\n" for one in context))
    body = json.dumps({"choices": [{"message": {"content": '{"verdict": "tie"}'}, "finish_reason": "stop"}]}).encode()
    with ChatServer(lambda asked: Said(body=body)) as server:
        judge = Judge("j", server.url, tmp_path / "calls.jsonl")
        found = vote_on_file(votes, judge, tmp_path / "j.jsonl", contexts=contexts, pictures=tmp_path / "kept")
    assert found.blind == 2  # nothing is known of hash2 and of hash9
    contents = {json.dumps(request.body["messages"][1]["content"]): request for request in server.requests}
    by_question = {number: [c for c in contents if f"picture {number}?" in c] for number in range(5)}
    assert all(len(both) == 2 for both in by_question.values())
    for text in by_question[0]:
        assert "data:image/png;base64," in text and "[Context]" not in text
    for text in by_question[1]:
        assert "A red square, 1." in text and "base64" not in text
    for number in (2, 3):
        assert all("[Context]" not in text and "base64" not in text for text in by_question[number])
    for text in by_question[4]:
        assert "A red square, 0." in text and "base64" not in text and "[Said before]" in text and "Hello" in text
        assert text.count("picture 4?") == 1  # the question itself is not said twice
    assert found.answered.to_json()["prompt_tokens"] > 2000  # two calls with an image, counted by us


def test_folders_are_looked_at_before_anything_is_asked(votes: Path, tmp_path: Path) -> None:
    judge = Judge("j", "http://127.0.0.1:9/v1", tmp_path / "calls.jsonl")
    with pytest.raises(InputError, match="missing does not exist"):
        vote_on_file(votes, judge, tmp_path / "missing" / "j.jsonl", contexts=None, pictures=None)
    with pytest.raises(InputError, match="kept does not exist"):
        vote_on_file(votes, judge, tmp_path / "j.jsonl", contexts=None, pictures=tmp_path / "kept")
    assert not (tmp_path / "j.jsonl").exists()
