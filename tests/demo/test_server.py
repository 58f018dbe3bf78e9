"""The demo over HTTP, with requests by hand: strange input, other people's files, many visitors, a kill."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from demo.guard import MAX_PICTURES, MAX_UPLOAD
from qllava.data.votes import VoteFile
from qllava.inference import load
from tests.demo.server import Visitor, computes, endless_model, memory_of, served, texts, wait_until
from tests.tiny_models import make_picture, make_tiny_llava

Server = tuple[str, subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with served(model, "--keep-pictures", str(model.parent / "kept")) as running:
        yield running


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    make_picture("red", (300, 200)).save(path)
    return path


def uploaded(visitor: Visitor, path: Path) -> str:
    (found,) = visitor.upload(path).json()
    return str(found)


def last(outputs: list[Any]) -> str:
    return texts(outputs[0])[-1]


def test_it_answers_as_the_model_does(server: Server, model: Path, red: Path) -> None:
    visitor = Visitor(server[0])
    expected = load(str(model)).answer(red, "What colour is it?", max_new_tokens=512)
    chatbot, _, pace = visitor.ask("What colour is it?", uploaded(visitor, red))
    shown = texts(chatbot)[-1].replace("&lt;", "<").replace("&amp;", "&")
    assert "".join(shown.split()) == "".join(expected.split())
    assert "tokens" in pace


def test_what_is_no_picture_is_said_in_words(server: Server, tmp_path: Path) -> None:
    visitor = Visitor(server[0])
    (tmp_path / "letter.png").write_text("Dear reader")
    (tmp_path / "code.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    make_picture("red").save(tmp_path / "half.jpg")
    half = (tmp_path / "half.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(half[: len(half) // 2])
    for name in ("letter.png", "code.png", "half.jpg"):
        said = last(visitor.ask("What is it?", uploaded(visitor, tmp_path / name)))
        assert said.startswith(name) and ("no picture" in said or "cannot be used" in said), said
        assert str(tmp_path) not in said and "/" not in said
    assert last(visitor.ask("Are you there?")) and not last(visitor.ask("And now?")).startswith("half")


def test_a_huge_file_is_refused_before_it_is_read(server: Server) -> None:
    before = memory_of(server[1])
    visitor = Visitor(server[0])
    assert visitor.upload(name="large.png", content=bytes(50_000_000)).status_code == 413
    reply = visitor.upload(name="vast.png", content=bytes(MAX_PICTURES * MAX_UPLOAD + 2**20))
    assert reply.status_code == 413 and f"of {MAX_UPLOAD // 2**20} MB" in reply.json()["detail"]
    assert memory_of(server[1]) < before + 60


def test_a_huge_picture_is_not_decoded(server: Server, tmp_path: Path) -> None:
    Image.new("1", (30_000, 30_000)).save(tmp_path / "vast.png")
    visitor = Visitor(server[0])
    before = memory_of(server[1])
    assert "50 million pixels" in last(visitor.ask("What is it?", uploaded(visitor, tmp_path / "vast.png")))
    assert memory_of(server[1]) < before + 60


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "question is empty"),
        (" \n ", "question is empty"),
        ("word " * 40_000, "200,000 characters"),
        ("word " * 15_000, "this model reads at most"),
        ("What is <image> it?", "<image>"),
        ("Hello<|im_end|> there", "control token"),
    ],
)
def test_strange_text_gets_a_clear_answer(server: Server, text: str, said: str) -> None:
    visitor = Visitor(server[0])
    assert said in last(visitor.ask(text)).replace("&lt;", "<").replace("&amp;", "&")
    assert last(visitor.ask("Hello"))


def test_a_message_beyond_all_measure_is_refused(server: Server) -> None:
    visitor = Visitor(server[0])
    assert visitor.ask("x" * 3_000_000) == []
    assert "at most 2 MB" in visitor.refused
    assert visitor.client.post("/gradio_api/queue/join", content=iter([b"{}"])).status_code == 411, "of unknown length"


def test_uploads_are_deleted_once_they_are_asked_about(server: Server, red: Path) -> None:
    visitor = Visitor(server[0])
    path = uploaded(visitor, red)
    assert visitor.client.get(f"/gradio_api/file={path}").content == red.read_bytes()
    chatbot, *_ = visitor.ask("What?", path)
    assert visitor.client.get(f"/gradio_api/file={path}").status_code == 403
    shown = visitor.client.get(chatbot[0]["content"][0]["file"]["url"])
    assert shown.is_success and shown.headers["content-type"] == "image/png"


def test_nobody_reads_what_another_has_uploaded(server: Server, red: Path) -> None:
    mine, other = Visitor(server[0]), Visitor(server[0])
    path = uploaded(mine, red)
    assert other.client.get(f"/gradio_api/file={path}").status_code == 403
    assert httpx.get(f"{server[0]}/gradio_api/file={path}").status_code == 403
    for spelled in (path, path.replace("/uploads", "/../" + path.split("/")[2] + "/uploads")):
        assert other.ask("What is it?", spelled) == [] and "not yours" in other.refused
        assert (
            other.press("question-camera", "input", [other.file(spelled), None]) == [] and "not yours" in other.refused
        )
    chatbot, *_ = mine.ask("What is it?", path)
    shown = chatbot[0]["content"][0]["file"]["url"]
    assert mine.client.get(shown).is_success and other.client.get(shown).status_code == 403
    other.session = mine.session  # not even with the name of the other's page
    assert texts(other.ask("And now?")[0], "user") == ["And now?"]


def test_a_question_is_answered_once(server: Server) -> None:
    visitor = Visitor(server[0])
    chatbot, *_ = visitor.ask("Hello")
    assert visitor.answer("question")[0] == chatbot
    visitor.press("question", "submit", [{"text": "One", "files": []}])
    chatbot, *_ = visitor.ask("Two")
    assert texts(chatbot, "user") == ["Hello", "One", "Two"] and texts(chatbot)[1] == "(stopped)"
    left, right, *_ = visitor.ask("Which?", box="pair")
    again = visitor.answer("pair")
    assert "asked already" in last(again)
    assert visitor.press("vote-left", "click") == [] or "Left was" not in visitor.refused


def test_a_picture_that_is_sent_twice_is_two_pictures(server: Server, red: Path) -> None:
    visitor = Visitor(server[0])
    files = [("files", (red.name, red.read_bytes()))] * 2
    paths = visitor.client.post("/gradio_api/upload", files=files).json()
    chatbot, *_ = visitor.ask("What?", *paths)
    assert len([part for part in chatbot[0]["content"] if part["type"] == "file"]) == 2


def test_a_new_question_stops_the_answer_to_the_last(tmp_path: Path) -> None:
    with served(endless_model(tmp_path / "model"), watched=True) as (address, process):
        visitor = Visitor(address)
        visitor.press("question", "submit", [{"text": "One", "files": []}])
        visitor.answer("question", wait=False)
        wait_until(lambda: computes(process, tmp_path), 60)
        other = Visitor(address)
        other.client.cookies, other.session = visitor.client.cookies, visitor.session
        other.press("question", "submit", [{"text": "Two", "files": []}], wait=False)
        wait_until(lambda: not computes(process, tmp_path), 2)


@pytest.mark.parametrize("spelled", ["{}", "/{}", "..{}", "{}/../{}", "%2e%2e{}", "//{}"])
def test_files_of_the_machine_cannot_be_read(server: Server, model: Path, spelled: str) -> None:
    visitor = Visitor(server[0])
    for secret in ("/etc/passwd", str(model / "config.json"), str(Path(__file__)), "demo.log"):
        address = spelled.replace("{}", secret)
        for prefix in ("/gradio_api/file=", "/gradio_api/file/", "/file="):
            reply = visitor.client.get(prefix + address)
            assert not reply.is_success, (prefix, address)
            assert b"root:" not in reply.content and b"image_token" not in reply.content
        visitor.ask("What is it?", secret)
        assert visitor.refused, "Gradio refuses a path that is no upload"


def test_no_answer_names_a_path_of_the_machine(server: Server, model: Path, red: Path) -> None:
    visitor = Visitor(server[0])
    seen = [visitor.client.get(path).text for path in ("/", "/config", "/gradio_api/info", "/gradio_api/app_id")]
    path = uploaded(visitor, red)
    seen += [path, json.dumps(visitor.ask("What?", path)), json.dumps(visitor.ask("", "/etc/passwd")), visitor.refused]
    seen.append(visitor.client.get("/gradio_api/file=nothing").text)
    for text in seen:
        for place in ("qllava-demo-", str(model.parent), str(Path.home()) + "/", str(Path(__file__).parents[2])):
            assert place not in text


def test_twenty_at_once_are_all_answered(server: Server, red: Path) -> None:
    said: list[str] = []
    before = memory_of(server[1])

    def one(number: int) -> None:
        visitor = Visitor(server[0])
        said.append(last(visitor.ask(f"What is number {number}?", uploaded(visitor, red))))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 20 and all(said)
    assert server[1].poll() is None
    assert memory_of(server[1]) < before + 200


def test_a_vote_is_a_line_with_its_picture_beside_it(server: Server, model: Path, red: Path) -> None:
    visitor = Visitor(server[0])
    votes = model.parent / "votes.jsonl"
    before = len(VoteFile(votes).votes)
    left, right, *_ = visitor.ask("Which?", uploaded(visitor, red), box="pair")
    result = visitor.press("vote-left", "click")
    assert "Left was" in result[-1]
    (vote,) = VoteFile(votes).votes[before:]
    assert vote.vote == "left" and vote.question == "Which?" and set(vote.models.values()) == {
        "model", "model (temperature 0.8)"
    }  # fmt: skip
    assert "".join(vote.answers["left"].split()) == "".join(
        texts(left)[-1].replace("&lt;", "<").replace("&amp;", "&").split()
    )
    assert (model.parent / "kept" / f"{vote.pictures[0]}.png").is_file()
    assert visitor.press("vote-right", "click") == [] and "already" in visitor.refused, "a pair has one vote"


def test_stop_ends_the_models_thread_and_keeps_what_was_said(tmp_path: Path) -> None:
    with served(endless_model(tmp_path / "model"), watched=True) as (address, process):
        visitor, answers = Visitor(address), list[list[Any]]()
        thread = threading.Thread(target=lambda: answers.append(visitor.ask("Talk")))
        thread.start()
        assert visitor.hears.wait(60) and computes(process, tmp_path)
        presser = Visitor(address)
        presser.client.cookies, presser.session = visitor.client.cookies, visitor.session
        presser.press("question", "stop", wait=False)
        wait_until(lambda: not computes(process, tmp_path), 2)
        thread.join(10)
        assert last(answers[0])
        assert last(visitor.ask("")) == "The question is empty; write what you want to know.", "it goes on"


def test_closing_the_page_ends_the_models_thread_and_deletes_its_pictures(tmp_path: Path, red: Path) -> None:
    with served(endless_model(tmp_path / "model"), watched=True) as (address, process):
        visitor = Visitor(address)
        with visitor.client.stream("GET", f"/gradio_api/heartbeat/{visitor.session}") as heartbeat:
            lines = heartbeat.iter_lines()  # held: the connection is closed with it
            next(lines)
            chatbot = visitor.press(
                "question", "submit", [{"text": "Talk", "files": [visitor.file(uploaded(visitor, red))]}]
            )[0]
            shown = chatbot[0]["content"][0]["file"]["url"]
            assert visitor.client.get(shown).is_success
            visitor.answer("question", wait=False)
            wait_until(lambda: computes(process, tmp_path), 60)
        wait_until(lambda: not computes(process, tmp_path), 5)
        wait_until(lambda: visitor.client.get(shown).status_code == 403, 5)


def test_a_password_is_asked_for(model: Path, tmp_path: Path) -> None:
    (tmp_path / "who").write_text("anna:secret\n")
    with served(model, "--auth", str(tmp_path / "who")) as (address, _):
        assert httpx.get(f"{address}/config").status_code == 401
        client = httpx.Client(base_url=address)
        assert client.post("/login", data={"username": "anna", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "anna", "password": "secret"}).is_success
        assert client.get("/config").is_success
