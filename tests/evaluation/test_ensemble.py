"""Two that answer as one: the paper's rules on real answers beside a plain computation, and judges with a fault."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from qllava import cli
from qllava.config import InputError
from qllava.evaluation.asking import Judge
from qllava.evaluation.ensemble import EnsembleResult, combine, combine_files
from qllava.evaluation.scienceqa import ScienceProblem
from tests.evaluation.made_up import write_science
from tests.llm.server import ChatServer, Said

REFUSES = re.compile("animal|sentence|text|best", re.IGNORECASE)


@pytest.fixture(params=["made up", "real"])
def science(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of problems and answers: made up, and the released ones where they are there."""
    return request.getfixturevalue("shared_data") / "scienceqa" if request.param == "real" else write_science(tmp_path)


def counted(science: Path) -> int:
    """How many problems the first of them answers right, as it was counted."""
    return int(json.loads((science / "expected.json").read_text())["correct"]["gpt3_cot"])


def problem(number: int, answer: int = 0) -> ScienceProblem:
    """Problem "1", "2", ... with four choices, the first of them right."""
    return ScienceProblem(str(number), f"Question {number}?", ("a", "b", "c", "d"), answer, "", None, "NAT", 3, "test")


def students(text: str) -> tuple[str, str]:
    """The answers that a judge is shown."""
    first, second = re.split(r"\[Student [12]\]\n", text)[1:]
    return first.strip(), second.strip()


def test_complement_by_hand() -> None:
    problems = [problem(n) for n in range(1, 6)]
    first = {"1": "A", "2": "B", "3": "I do not know.", "4": "", "5": "The answer is Z."}
    partner = {"1": "B", "2": "A", "3": "A", "4": "C", "5": "A"}
    found = combine(problems, first, partner, "complement")
    assert (found.first.total.count, found.partner.total.count, found.ensemble.total.count) == (1, 3, 2)
    assert (found.helped, found.hurt, found.changed) == (("3",), (), 2)
    assert (found.ensemble.unparsed, found.ensemble.not_a_choice) == (0, 1)  # Z was read, so the partner is not asked
    assert found.gain.value == pytest.approx(0.2) and found.mcnemar == 1.0
    assert found.decisions is None


def plain_letter(text: str) -> str:
    """Good enough for the real answers: they state their letter, or are empty."""
    return "".join(re.findall(r"The answer is ([A-E])\.", text))


def read(path: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["question_id"]: row["text"] for row in rows}


def plain(science: Path, first: str, partner: str, decide: Callable[[dict[str, Any], str, str], str]) -> dict[str, Any]:
    """The ensemble once more, as a loop over the files."""
    problems = json.loads((science / "problems.json").read_text())
    said = [
        {id: plain_letter(text) for id, text in read(science / f"{name}.jsonl").items()} for name in (first, partner)
    ]
    counts = {"correct": 0, "correct_image": 0, "helped": 0, "hurt": 0}
    for id, row in problems.items():
        right = "ABCDE"[row["answer"]]
        one, other = said[0][id], said[1][id]
        final = decide(row, one, other)
        counts["correct"] += final == right
        counts["correct_image"] += final == right and row["image"] is not None
        counts["helped"] += final == right and one != right
        counts["hurt"] += final != right and one == right
    return counts


def compare(found: EnsembleResult, wanted: dict[str, Any]) -> None:
    result = found.to_json()
    for key in ("correct", "correct_image"):
        assert result[key] == wanted[key]
    assert (len(result["helped"]), len(result["hurt"])) == (wanted["helped"], wanted["hurt"])
    assert result["gain"]["value"] == pytest.approx((wanted["helped"] - wanted["hurt"]) / 90)
    total = wanted["helped"] + wanted["hurt"]
    assert result["mcnemar_p"] == pytest.approx(binomtest(wanted["helped"], total).pvalue)
    assert result["gain"]["ci95"][0] <= result["gain"]["value"] <= result["gain"]["ci95"][1]
    assert sum(group["helped"] for group in result["groups"].values() if group["n"]) >= wanted["helped"]


def test_complement_on_real_answers(science: Path) -> None:
    """GPT-3 leaves eight unanswered; LLaVA answers them."""
    files = [science / f"{name}.jsonl" for name in ("gpt3_cot", "llava_13b_v0")]
    found = combine_files(science / "problems.json", *files, "complement")
    compare(found, plain(science, "gpt3_cot", "llava_13b_v0", lambda row, one, other: one or other))
    assert found.ensemble.total.count > found.first.total.count == counted(science)


def test_a_judge_on_real_answers(science: Path, tmp_path: Path) -> None:
    """The judge prefers the longer answer, and on some questions says nothing that can be read."""

    def says(text: str) -> str:
        one, other = students(text)
        longer = max((one, other), key=lambda said: (len(said), said))
        return "I cannot tell." if REFUSES.search(text.split("\n")[0]) else f"So. The answer is {plain_letter(longer)}."

    texts = [read(science / f"{name}.jsonl") for name in ("llava_13b_v0", "gpt3_cot")]
    problems = json.loads((science / "problems.json").read_text())
    ids = {json.dumps(row): id for id, row in problems.items()}

    def decide(row: dict[str, Any], one: str, other: str) -> str:
        id = ids[json.dumps(row)]
        if one == other or REFUSES.search(f"Question: {row['question']}".split("\n")[0]):
            return one or other
        return plain_letter(max((text[id].strip() or "(no answer)" for text in texts), key=lambda t: (len(t), t)))

    files = [science / f"{name}.jsonl" for name in ("llava_13b_v0", "gpt3_cot")]
    with ChatServer(lambda asked: Said(says(asked.last))) as server:
        judge = Judge("scripted", server.url, tmp_path / "calls.jsonl")
        found = combine_files(science / "problems.json", *files, "judge", judge=judge)
        asked = len(server.requests)
        again = combine_files(science / "problems.json", *files, "judge", judge=judge)
        assert len(server.requests) == asked  # nothing is asked twice
    compare(found, plain(science, "llava_13b_v0", "gpt3_cot", decide))
    assert found.decisions is not None and again.decisions is not None
    differ = len(found.decisions.problems)
    # Two of the problems read alike and were answered alike, so there is less to ask than two calls for each.
    assert asked == len({request.last for request in server.requests}) == 2 * differ - 2
    assert asked > 40
    assert found.decisions.inconsistent == 0 and 0 < found.decisions.unread < differ
    assert found.decisions.seen_first.value == 0.5
    words = sum(len(message["content"].split()) for one in server.requests for message in one.body["messages"])
    assert found.decisions.to_json()["prompt_tokens"] == words  # the server counts words
    assert found.decisions.to_json()["calls"] == asked
    assert found.decisions.to_json()["name"] == "scripted"
    assert again.to_json() | {"judge": None} == found.to_json() | {"judge": None}
    assert (found.decisions.to_json()["asked_now"], again.decisions.to_json()["asked_now"]) == (asked, 0)


def test_a_judge_that_takes_the_first_answer_is_exposed(science: Path, tmp_path: Path) -> None:
    files = [science / f"{name}.jsonl" for name in ("llava_13b_v0", "gpt3_cot")]
    with ChatServer(lambda asked: Said(students(asked.last)[0])) as server:
        judge = Judge("first", server.url, tmp_path / "calls.jsonl")
        found = combine_files(science / "problems.json", *files, "judge", judge=judge)
    assert found.decisions is not None
    assert found.decisions.seen_first.value == 1.0
    # GPT-3's empty answers give no letter to repeat; everywhere else the two orders lead to two letters.
    assert found.decisions.inconsistent + found.decisions.unread == len(found.decisions.problems)
    assert found.ensemble.total == found.first.total and found.gain.value == 0.0
    assert "position bias" in found.text()


def test_a_third_answer_counts_when_it_is_given_twice(tmp_path: Path) -> None:
    problems = [problem(1, answer=2), problem(2, answer=2)]
    answers, partner = {"1": "A", "2": "A"}, {"1": "B", "2": "A"}
    with ChatServer(lambda asked: Said("The answer is C.")) as server:
        found = combine(problems, answers, partner, "judge", Judge("j", server.url, tmp_path / "c.jsonl"))
        assert len(server.requests) == 2
    assert found.helped == ("1",)
    assert found.decisions is not None and found.decisions.seen_first.n == 0
    assert found.to_json()["judge"]["seen_first"]["undefined"] == "it decided for neither answer"


def test_the_judge_gets_the_problem_in_words(tmp_path: Path) -> None:
    shown = ScienceProblem("1", "What is it?", ("cat", "dog"), 0, "It barks.", "image.png", "NAT", 3, "test")
    with ChatServer(lambda asked: Said("The answer is A.")) as server:
        combine([shown], {"1": "B"}, {}, "judge", Judge("j", server.url, tmp_path / "c.jsonl"))
    texts = {request.last for request in server.requests}
    assert len(texts) == 2  # both orders
    for text in texts:
        assert "What is it?" in text and "It barks." in text and "(A) cat (B) dog" in text
        assert "which you cannot see" in text and "(no answer)" in text
    assert all(request.body["temperature"] == 0.0 and request.body["model"] == "j" for request in server.requests)


def test_who_do_not_differ_need_no_judge(tmp_path: Path) -> None:
    nobody = Judge("j", "http://127.0.0.1:9/v1", tmp_path / "c.jsonl")
    found = combine([problem(1)], {"1": "A"}, {"1": "The answer is A."}, "judge", nobody)
    assert found.ensemble.total.count == 1 and found.decisions is not None and found.decisions.problems == ()
    assert found.to_json()["judge"]["calls"] == 0


def test_the_command(science: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", "ensemble", "--problems", str(science / "problems.json")]
    line += ["--answers", str(science / "gpt3_cot.jsonl"), "--partner", str(science / "llava_13b_v0.jsonl")]
    assert cli.main([*line, "--rule", "complement", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rule"] == "complement" and found["judge"] is None and found["first"]["correct"] == counted(science)
    assert cli.main([*line, "--rule", "complement"]) == 0
    said = capsys.readouterr().out
    assert "8 answers changed" in said and "McNemar" in said
    assert cli.main([*line, "--rule", "judge"]) == 1
    assert cli.main([*line, "--rule", "complement", "--judge", "j"]) == 1
    capsys.readouterr()
    nobody = ["--judge", "j", "--base-url", "http://127.0.0.1:9/v1", "--store", str(tmp_path / "new" / "calls.jsonl")]
    assert cli.main([*line, "--rule", "judge", *nobody]) == 1
    assert "No server answers at http://127.0.0.1:9/v1" in capsys.readouterr().err
    for wrong in ("temperature", "[1]", '{"model": "other"}'):
        with pytest.raises(SystemExit) as end:
            cli.main([*line, "--rule", "judge", *nobody, "--parameters", wrong])
        assert end.value.code == 2
    with ChatServer(lambda asked: Said("The answer is A.")) as server:
        nobody[3:] = [server.url, "--store", str(tmp_path / "more.jsonl"), "--parameters", '{"seed": 5}']
        assert cli.main([*line, "--rule", "judge", *nobody, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["judge"]["parameters"] == {"seed": 5}
    assert all(request.body["seed"] == 5 and "temperature" not in request.body for request in server.requests)


def test_answers_to_other_problems_are_refused(science: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"question_id": "no such", "text": "A"}\n')
    with pytest.raises(InputError, match=r"other\.jsonl answers none"):
        combine_files(science / "problems.json", science / "gpt3_cot.jsonl", tmp_path / "other.jsonl", "complement")
