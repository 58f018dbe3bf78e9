"""Whole runs against a real server: every task accounted for, nothing paid twice, examples that training accepts."""

from __future__ import annotations

import json
import shutil
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qllava import cli
from qllava.config import InputError
from qllava.data.contexts import read_contexts
from qllava.synthesis import pipeline, prompting
from qllava.synthesis.output import OUTCOMES
from qllava.synthesis.pipeline import Job, Result
from qllava.synthesis.prompting import DEFAULT_TYPES, STYLES, Prompts
from qllava.synthesis.tasks import Asking, Form, make_tasks, of_shard
from tests.llm.server import ChatServer, Request, Said
from tests.synthesis.teaching import badly, good, is_repair, kind_of, read_lines, well, write_contexts


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def make_job(folder: Path, count: int = 6, name: str = "out.json", **asking: Any) -> Job:
    contexts = read_contexts(write_contexts(folder / "contexts.jsonl", count))
    out = folder / name
    prompts = asking.pop("prompts", Prompts())
    return Job(
        make_tasks(contexts, DEFAULT_TYPES), Asking("m", prompts, **asking), out, out.with_suffix(".calls.jsonl")
    )


def run(job: Job, server: ChatServer, **limits: Any) -> Result:
    return pipeline.run(job, server.url, **{"first_rest": 0.005, **limits})


def records_of(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else list(json.loads(text))


def test_everything_that_goes_wrong_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(tmp_path, 60)
    with ChatServer(badly) as server:
        result = run(job, server, concurrency=12)
        again = run(job, server)
    assert set(server.paid.values()) == {1}, "a call was paid twice"
    assert again.calls == 0
    assert result.calls == len(server.paid) == len(read_lines(job.store))

    # Every task has one outcome, and stands in one of the two files.
    told = result.to_json()
    assert told["tasks"] == sum(told["outcomes"].values()) == 180
    assert all(told["outcomes"][outcome] for outcome in ("accepted", "repaired", "dropped")), told
    rows, left_out = records_of(job.out), read_lines(tmp_path / "out.left_out.jsonl")
    assert len(rows) == told["rows"] == told["outcomes"]["accepted"] + told["outcomes"]["repaired"]
    ids = [row["id"] for row in rows] + [f"{line['id']}-{line['type']}" for line in left_out]
    assert Counter(ids) == Counter(task.id for task in job.tasks)
    assert Counter(line["reason"] for line in left_out) == told["dropped"]
    assert {"refused", "truncated", "object", "captions", "boxes", "unparsed", "empty"} <= set(told["broken"])
    order = {task.id: number for number, task in enumerate(job.tasks)}
    assert [row["id"] for row in rows] == sorted((row["id"] for row in rows), key=order.__getitem__)

    # Nothing that is wrong came through, and what came is data that training takes.
    text = job.out.read_text(encoding="utf-8")
    assert not [word for word in ("toothbrush", "caption", "bounding", "sorry", "0.100") if word in text]
    for row in rows:
        Image.new("RGB", (8, 8)).save(tmp_path / row["image"])
    capsys.readouterr()
    assert cli.main(["check", str(job.out), "--json"]) == 0, capsys.readouterr().out
    assert json.loads(capsys.readouterr().out)["samples"] == len(rows)


def test_rows_are_llavas(tmp_path: Path) -> None:
    job = make_job(tmp_path, 1)
    with ChatServer(well) as server:
        run(job, server)
    conversation, detail, reasoning = records_of(job.out)
    assert conversation["id"] == "p0000-conversation"
    assert conversation["image"] == "p0000.png"
    assert [turn["from"] for turn in conversation["conversations"]] == ["human", "gpt", "human", "gpt"]
    assert conversation["conversations"][0]["value"] == "<image>\nWhat is on the left?"
    assert conversation["conversations"][2]["value"] == "And next to it?"
    questions = (Path(prompting.__file__).parent / "prompts/detail_questions.txt").read_text().splitlines()
    assert detail["conversations"][0]["value"].removeprefix("<image>\n") in questions
    assert reasoning["type"] == "reasoning"
    assert not (tmp_path / "out.left_out.jsonl").exists()


def test_a_reply_that_breaks_a_rule_is_asked_for_once_more_and_no_more(tmp_path: Path) -> None:
    def lies(request: Request) -> Said:
        stubborn = kind_of(request) == "detail"
        return Said(good(request, "A toothbrush lies there.") if stubborn or not is_repair(request) else good(request))

    job = make_job(tmp_path)
    with ChatServer(lies) as server:
        told = run(job, server).to_json()
    assert told["by_type"]["conversation"]["repaired"] == told["by_type"]["reasoning"]["repaired"] == 6
    assert told["by_type"]["detail"]["dropped"] == told["dropped"]["object"] == 6
    assert server.asked.total() == 2 * len(job.tasks)
    repair = next(request for request in server.requests if is_repair(request))
    assert [message["role"] for message in repair.body["messages"][-3:]] == ["user", "assistant", "user"]
    assert "toothbrush" in repair.last


def test_a_refusal_is_dropped_and_not_asked_again(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    with ChatServer(lambda request: Said(None, refusal="No.")) as server:
        told = run(job, server).to_json()
    assert told["dropped"] == {"refused": 18}
    assert server.asked.total() == 18


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_takes_no_schema_is_asked_for_blocks_after_one_call(tmp_path: Path, status: int) -> None:
    def old(request: Request) -> Said:
        return Said("response_format", status=status) if "response_format" in request.body else well(request)

    job = make_job(tmp_path, 12)
    with ChatServer(old) as server:
        assert run(job, server, concurrency=12).counts.total("accepted") == 36
        assert sum("response_format" in request.body for request in server.requests) == 1
        assert run(job, server).calls == 0
    new = replace(job, out=tmp_path / "new.json", store=tmp_path / "new.calls.jsonl")
    with ChatServer(well) as server:
        run(new, server)
        assert sum("response_format" in request.body for request in server.requests) == 24
    assert new.out.read_bytes() == job.out.read_bytes()


def test_an_image_that_the_server_does_not_like_is_no_sign_against_schemas(tmp_path: Path) -> None:
    def too_long(request: Request) -> Said:
        return Said("too long", status=400) if "picture 0" in request.last else well(request)

    job = make_job(tmp_path)
    with ChatServer(too_long) as server:
        told = run(job, server).to_json()
    assert told["outcomes"]["failed"] == 3
    assert {line["reason"] for line in read_lines(tmp_path / "out.left_out.jsonl")} == {"status 400: too long"}
    answered = [r for r in server.requests if "picture 0" not in r.last and kind_of(r) != "detail"]
    assert all("response_format" in request.body for request in answered)


@pytest.mark.parametrize("form", ["schema", "blocks"])
def test_the_form_can_be_fixed(tmp_path: Path, form: Form) -> None:
    job = make_job(tmp_path, form=form)
    with ChatServer(well) as server:
        run(job, server)
    assert sum("response_format" in request.body for request in server.requests) == (12 if form == "schema" else 0)


def test_a_schema_that_is_accepted_and_ignored_does_no_harm(tmp_path: Path) -> None:
    def ignores(request: Request) -> Said:
        body = {name: value for name, value in request.body.items() if name != "response_format"}
        return Said(good(replace(request, body=body)))

    job = make_job(tmp_path)
    with ChatServer(ignores) as server:
        assert run(job, server).counts.total("accepted") == 18


def test_failed_tasks_are_asked_again_by_the_next_run(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    with ChatServer(lambda r: Said("down", status=500) if "picture 3" in r.last else well(r)) as server:
        first = run(job, server, retries=1)
        assert first.counts.total("failed") == 3
        assert len(records_of(job.out)) == 15
        assert {line["outcome"] for line in read_lines(tmp_path / "out.left_out.jsonl")} == {"failed"}
        server.answer = well
        second = run(job, server)
    assert second.calls == 3
    assert len(records_of(job.out)) == 18
    assert not (tmp_path / "out.left_out.jsonl").exists()


def test_a_changed_prompt_asks_its_own_type_again_and_no_other(tmp_path: Path) -> None:
    shutil.copytree(Path(prompting.__file__).parent / "prompts", tmp_path / "mine")
    with ChatServer(well) as server:
        job = make_job(tmp_path, prompts=Prompts(tmp_path / "mine"))
        run(job, server)
        path = tmp_path / "mine" / "reasoning.txt"
        path.write_text(path.read_text().replace("two to six sentences", "two to five sentences"))
        before = len(server.requests)
        run(make_job(tmp_path, prompts=Prompts(tmp_path / "mine")), server)
    assert [kind_of(request) for request in server.requests[before:]] == ["reasoning"] * 6


def test_what_differs_in_model_or_parameters_is_another_call(tmp_path: Path) -> None:
    with ChatServer(well) as server:
        run(make_job(tmp_path), server)
        run(make_job(tmp_path, parameters={"temperature": 0}), server)
    assert server.asked.total() == 36
    assert server.requests[-1].body["temperature"] == 0
    assert "max_tokens" not in server.requests[-1].body


def test_a_budget_leaves_the_rest_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    with ChatServer(well) as server:
        first = run(job, server, max_calls=7)
        assert (first.counts.total("accepted"), first.counts.total("left")) == (7, 11)
        assert {line["reason"] for line in read_lines(tmp_path / "out.left_out.jsonl")} == {"not asked yet"}
        second = run(job, server, max_calls=100)
    assert second.counts.total("accepted") == 18
    assert server.asked.total() == 18


def test_the_estimate_is_near_and_asks_nobody(tmp_path: Path) -> None:
    job = make_job(tmp_path, 20)
    expected = pipeline.estimate(job)
    assert (expected["tasks"], expected["calls"], expected["calls_at_most"]) == (60, 60, 120)
    assert not job.store.exists()
    with ChatServer(well) as server:
        run(job, server, max_calls=30)
        assert pipeline.estimate(job)["calls"] == 30
        characters = sum(len(m["content"]) for r in server.requests[:30] for m in r.body["messages"])
        assert pipeline.estimate(job)["prompt_tokens"] == pytest.approx(characters / 4, rel=0.2)
        run(job, server)
    assert pipeline.estimate(job)["tokens_at_most"] == 0


def test_shards_together_are_the_whole(tmp_path: Path) -> None:
    whole = make_job(tmp_path, 40)
    contexts = read_contexts(tmp_path / "contexts.jsonl")
    with ChatServer(badly) as server:
        run(whole, server)
    parts = []
    for number in (1, 2, 3):
        tasks = make_tasks(of_shard(contexts, number, 3), DEFAULT_TYPES)
        part = replace(whole, tasks=tasks, out=tmp_path / f"{number}.jsonl", store=tmp_path / f"{number}.calls.jsonl")
        with ChatServer(badly) as server:
            run(part, server)
        parts.append(part)
    together = [row for part in parts for row in records_of(part.out)]
    assert all(part.tasks for part in parts)
    assert sorted(together, key=lambda row: str(row["id"])) == sorted(
        records_of(whole.out), key=lambda row: str(row["id"])
    )
    assert len(together) == len({row["id"] for row in together})
    # Stores are put together as files are, too: then the whole asks nothing.
    kept = b"".join(part.store.read_bytes() for part in parts)
    merged = replace(whole, out=tmp_path / "merged.json", store=tmp_path / "merged.calls.jsonl")
    merged.store.write_bytes(kept)
    assert pipeline.run(merged, "http://127.0.0.1:9/v1").calls == 0
    assert merged.out.read_bytes() == whole.out.read_bytes()


def test_styles_are_shared_out_among_the_images(tmp_path: Path) -> None:
    contexts = read_contexts(write_contexts(tmp_path / "contexts.jsonl", 200))
    counts = Counter(task.style for task in make_tasks(contexts, ("reasoning",), STYLES))
    assert set(counts) == set(STYLES)
    assert min(counts.values()) > 10


def test_naive_needs_no_teacher(tmp_path: Path) -> None:
    contexts = read_contexts(write_contexts(tmp_path / "contexts.jsonl", 30))
    job = replace(make_job(tmp_path), tasks=make_tasks(contexts, ("naive",)))
    assert pipeline.run(job).counts.total("accepted") == 30
    captions = {context.id: context.captions for context in contexts}
    rows = records_of(job.out)
    assert all(row["conversations"][1]["value"] in captions[row["id"].removesuffix("-naive")] for row in rows)
    assert len({row["conversations"][0]["value"] for row in rows}) > 5


def test_an_old_output_stands_when_nobody_answers(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    job.out.write_text("old")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="No server answers"):
            pipeline.run(job, f"http://127.0.0.1:{free.getsockname()[1]}/v1")
    assert job.out.read_text() == "old"


def test_no_row_at_all_is_a_file_of_none(tmp_path: Path) -> None:
    for name, expected in (("out.json", []), ("out.jsonl", [])):
        job = make_job(tmp_path, name=name)
        with ChatServer(lambda request: Said("I'm sorry, I can't.")) as server:
            told = run(job, server).to_json()
        assert records_of(job.out) == expected
        assert tuple(told["outcomes"]) == OUTCOMES
        job.store.unlink()
