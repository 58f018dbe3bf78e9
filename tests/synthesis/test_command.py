"""`qllava synthesize` as it is typed: its exits, its one JSON object, the files that it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qllava import cli
from qllava.cli import synthesize
from qllava.synthesis import prompting
from qllava.synthesis.prompting import DEFAULT_TYPES, STYLES
from tests.llm.server import ChatServer, Request, Said
from tests.synthesis.teaching import badly, read_lines, well, write_contexts


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def run(folder: Path, *flags: str, teacher: str = "m") -> int:
    contexts = write_contexts(folder / "contexts.jsonl", 8)
    return cli.main(["synthesize", str(contexts), str(folder / "out.json"), "--teacher", teacher, *flags])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_one_json_object_and_every_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ChatServer(badly) as server:
        assert run(tmp_path, "--base-url", server.url, "--json", "--concurrency", "4") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tasks"] == sum(told["outcomes"].values()) == 24
    assert told["rows"] == len(json.loads((tmp_path / "out.json").read_text()))
    assert told["calls"] == told["calls_kept"] == len(server.paid)
    left_out = read_lines(tmp_path / "out.left_out.jsonl")
    assert {"contexts.jsonl", "out.json", "out.calls.jsonl", "report.html"} <= names(tmp_path)
    assert len(left_out) + told["rows"] == 24


def test_what_is_printed_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ChatServer(lambda r: Said("no", status=400) if "picture 3" in r.last else well(r)) as server:
        assert run(tmp_path, "--base-url", server.url) == 1
        said = capsys.readouterr().out
        assert "3 calls failed. First: p0003-conversation: status 400: no. The same command retries them" in said
        server.answer = well
        assert run(tmp_path, "--base-url", server.url) == 0
        assert "3 calls," in capsys.readouterr().out
        assert run(tmp_path, "--base-url", server.url, "--parameters", "{}", "--max-calls", "33") == 0
    assert "18 calls are still missing: the budget is spent" in capsys.readouterr().out


def test_a_dry_run_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["dry_run"], told["calls"], told["calls_at_most"]) == (True, 24, 48)
    assert run(tmp_path, "--dry-run") == 0
    assert "No call was sent." in capsys.readouterr().out
    assert names(tmp_path) == {"contexts.jsonl"}


def test_a_batch_leaves_requests_and_takes_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    assert run(tmp_path, "--export-batch", str(requests)) == 0
    assert "24 calls." in capsys.readouterr().out
    assert names(tmp_path) == {"contexts.jsonl", "requests.jsonl"}
    lines = []
    for line in read_lines(requests):
        message = {"content": well(Request(line["body"], {}, 0)).text}
        body = {"choices": [{"message": message, "finish_reason": "stop"}]}
        lines.append({"custom_id": line["custom_id"], "response": {"status_code": 200, "body": body}, "error": None})
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(tmp_path, "--import-batch", str(results), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["outcomes"]["accepted"] == 24
    assert told["imported"] == {"replies": 24, "known": 0, "failed": 0, "foreign": 0}


def test_a_dry_run_says_what_the_limits_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--dry-run", "--max-calls", "7", "--max-tokens-total", "5000") == 0
    said = capsys.readouterr().out
    assert "--max-calls 7 limits the number of requests, including repairs, retries and earlier runs" in said
    assert "--max-tokens-total 5,000 limits the tokens of prompts and replies" in said
    assert f"{48 * 7:,} requests" in said
    assert run(tmp_path, "--dry-run", "--json", "--retries", "1") == 0
    assert json.loads(capsys.readouterr().out)["requests_at_most"] == 48 * 2


def test_a_limit_of_tokens_without_one_of_replies_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for how in (["--export-batch", str(tmp_path / "requests.jsonl")], ["--base-url", "http://127.0.0.1:9/v1"]):
        assert run(tmp_path, *how, "--parameters", "{}", "--max-tokens-total", "99999") == 1
        assert "give max_tokens or max_completion_tokens in --parameters" in capsys.readouterr().err


def test_rules_ask_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--json", "--brief", "--seed", "3", teacher="rules") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tasks"] == told["rows"] + told["dropped"].get("too little known", 0) == 24
    rows = json.loads((tmp_path / "out.json").read_text())
    assert all(row["conversations"][0]["value"].startswith("<image>\n") for row in rows)
    assert all(
        turn["value"].count("<image>") == (number == 0)
        for row in rows
        for number, turn in enumerate(row["conversations"])
    )
    assert "out.calls.jsonl" not in names(tmp_path)


def test_rules_write_what_their_own_module_writes(tmp_path: Path) -> None:
    from qllava.data.contexts import read_contexts
    from qllava.synthesis.rules import examples as rules

    assert run(tmp_path, "--types", ",".join(synthesize._TYPES), teacher="rules") == 0
    contexts = read_contexts(tmp_path / "contexts.jsonl")
    assert json.loads((tmp_path / "out.json").read_text()) == [
        r for c in contexts for r in rules.write(c, synthesize._TYPES)
    ]


@pytest.mark.parametrize(
    ("teacher", "flags", "said"),
    [
        ("rules", ["--max-calls", "3"], "--max-calls has no effect with --teacher rules"),
        ("rules", ["--style", "steps"], "--style has no effect with --teacher rules"),
        ("m", ["--seed", "0"], "--seed has no effect with --teacher m"),
        ("m", ["--brief"], "--brief has no effect with --teacher m"),
        ("m", ["--style", "steps", "--types", "detail"], "--style has no effect on detail"),
        ("m", [], "https://api.openai.com/v1 needs a key"),
        ("m", ["--prompts", "nowhere"], "nowhere does not exist"),
        ("m", ["--store", "nowhere/calls.jsonl"], "the replies cannot be stored in this file"),
    ],
)
def test_wrong_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], teacher: str, flags: list[str], said: str
) -> None:
    assert run(tmp_path, *flags, teacher=teacher) == 1
    assert said in capsys.readouterr().err
    assert "out.json" not in names(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        ["--shard", "0/3"],
        ["--shard", "4/3"],
        ["--shard", "2"],
        ["--types", "detail,detail"],
        ["--types", "poem"],
        ["--style", "steps,rude"],
        ["--parameters", "[]"],
        ["--parameters", '{"model": "n"}'],
        ["--parameters", '{"stop": "\\ud83d"}'],
        ["--parameters", '{"temperature": NaN}'],
        ["--parameters", "[" * 100_000],
        ["--max-calls", "0"],
        ["--dry-run", "--export-batch", "b.jsonl"],
    ],
)
def test_a_wrong_command_line(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(tmp_path, *flags)
    assert end.value.code == 2


def test_a_folder_that_does_not_exist_is_told_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contexts = write_contexts(tmp_path / "contexts.jsonl", 2)
    assert cli.main(["synthesize", str(contexts), str(tmp_path / "no/out.json"), "--teacher", "m"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_the_names_of_the_command_are_those_of_the_package() -> None:
    """They stand twice, so that the command's help needs no import."""
    assert synthesize._TYPES[:3] == DEFAULT_TYPES
    assert set(synthesize._TYPES) == {*DEFAULT_TYPES, *prompting._QUESTIONS}
    assert synthesize._STYLES == STYLES


def test_two_runs_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qllava.llm.store import Store

    with Store(tmp_path / "out.calls.jsonl"):
        assert run(tmp_path, "--base-url", "http://127.0.0.1:9/v1") == 1
    assert "in use by process" in capsys.readouterr().err
