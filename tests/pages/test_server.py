"""The demo over HTTP, with requests by hand: strange input, other people's files, many visitors, a kill."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from qllava.inference import load
from qllava.pages.page import MAX_WAITING
from qllava.pages.talk import plain
from qllava.pages.uploads import MAX_IMAGES, MAX_UPLOAD
from qllava.voting.votes import VoteFile
from tests.commands import Command
from tests.pages.server import Visitor, computes, endless_model, kept_by, memory_of, served, texts, wait_until
from tests.tiny_models import make_image, make_tiny_llava

Server = tuple[str, Command]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Its answers end with its context: shorter ones than the usual 512 show the same.
    return make_tiny_llava(tmp_path_factory.mktemp("demo") / "model", context=160)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with served(model, "--keep-pictures", str(model.parent / "kept")) as running:
        yield running


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    make_image("red", (300, 200)).save(path)
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


def test_what_is_no_image_is_said_in_words(server: Server, model: Path, tmp_path: Path) -> None:
    visitor = Visitor(server[0])
    before = kept_by(model)
    (tmp_path / "letter.png").write_text("Dear reader")
    (tmp_path / "code.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    make_image("red").save(tmp_path / "half.jpg")
    half = (tmp_path / "half.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(half[: len(half) // 2])
    for name in ("letter.png", "code.png", "half.jpg"):
        reply = visitor.upload(tmp_path / name)
        assert reply.status_code == 422
        said = reply.text
        assert said.startswith(name) and ("not an image" in said or "cannot be used" in said), said
        assert str(tmp_path) not in said and "/" not in said
    assert kept_by(model) == before
    assert last(visitor.ask("Are you there?"))


def test_a_huge_file_is_refused_before_it_is_read(server: Server) -> None:
    before = memory_of(server[1])
    visitor = Visitor(server[0])
    assert visitor.upload(name="large.png", content=bytes(50_000_000)).status_code == 413
    assert visitor.upload(name="large.png", content=bytes(MAX_UPLOAD + 1)).text == "large.png is larger than 20 MB."
    reply = visitor.upload(name="vast.png", content=bytes(MAX_IMAGES * MAX_UPLOAD + 2**20))
    assert reply.status_code == 413 and f"of {MAX_UPLOAD // 2**20} MB" in reply.json()["detail"]
    assert memory_of(server[1]) < before + 60


def test_a_huge_image_is_not_decoded(server: Server, tmp_path: Path) -> None:
    Image.new("1", (30_000, 30_000)).save(tmp_path / "vast.png")
    visitor = Visitor(server[0])
    before = memory_of(server[1])
    assert "50 million pixels" in visitor.upload(tmp_path / "vast.png").text
    assert memory_of(server[1]) < before + 60


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "question is empty"),
        (" \n ", "question is empty"),
        ("word " * 40_000, "200,000 characters"),
        ("word " * 15_000, "the model's context is"),
    ],
)
def test_strange_text_gets_a_clear_answer(server: Server, text: str, said: str) -> None:
    visitor = Visitor(server[0])
    assert said in last(visitor.ask(text)).replace("&lt;", "<").replace("&amp;", "&")
    assert last(visitor.ask("Hello"))


@pytest.mark.parametrize("text", ["What is <image> it?", "Hello<|im_end|> there"])
def test_a_control_token_that_is_typed_is_text(server: Server, model: Path, text: str) -> None:
    """The conversation goes on, and the model answers what was typed."""
    visitor = Visitor(server[0])
    expected = load(str(model)).answer(None, text, max_new_tokens=512)
    chatbot, _, pace = visitor.ask(text)
    assert plain(texts(chatbot, "user")[-1]) == text and "tokens" in pace
    shown = plain(last([chatbot]))
    assert "".join(shown.split()) == "".join(expected.split())
    assert last(visitor.ask("Hello"))


def test_a_message_beyond_all_measure_is_refused(server: Server) -> None:
    visitor = Visitor(server[0])
    assert visitor.ask("x" * 3_000_000) == []
    assert "limit is 2 MB" in visitor.refused
    assert visitor.client.post("/gradio_api/queue/join", content=iter([b"{}"])).status_code == 411, "of unknown length"


def test_what_is_kept_and_served_is_pixels(server: Server, model: Path, tmp_path: Path) -> None:
    secret = Image.Exif()
    secret[0x010F] = "a camera that says where it was"
    make_image("red", (300, 200)).save(tmp_path / "photo.jpg", exif=secret, comment=b"a camera that says")
    visitor = Visitor(server[0])
    before = set(kept_by(model))
    path = uploaded(visitor, tmp_path / "photo.jpg")
    (kept,) = set(kept_by(model)) - before
    served_now = visitor.client.get(f"/gradio_api/file={path}")
    assert served_now.content == kept.read_bytes() and b"camera" not in served_now.content
    chatbot, *_ = visitor.ask("What?", path)
    assert visitor.client.get(f"/gradio_api/file={path}").status_code == 403, "it has moved to the page"
    shown = visitor.client.get(chatbot[0]["content"][0]["file"]["url"])
    assert shown.content == served_now.content and shown.headers["content-type"] == "image/png"
    assert {path.name for path in set(kept_by(model)) - before} == {kept.name}
    visitor.press("chat", "clear")
    assert set(kept_by(model)) == before, "a new conversation begins without the images of the last"


def test_an_upload_goes_with_its_page_though_nothing_was_asked(server: Server, model: Path, red: Path) -> None:
    before = set(kept_by(model))
    visitor = Visitor(server[0])
    other = Visitor(server[0])  # a second page of the same browser, which was opened later and stays
    other.client.cookies = visitor.client.cookies
    with ExitStack() as pages:
        with visitor.client.stream("GET", f"/gradio_api/heartbeat/{visitor.session}") as first:
            heartbeat = first.iter_lines()  # held: the connection is closed with it
            next(heartbeat)
            uploaded(visitor, red)
            assert len(set(kept_by(model)) - before) == 1
            second = pages.enter_context(other.client.stream("GET", f"/gradio_api/heartbeat/{other.session}"))
            lines = second.iter_lines()
            next(lines)
        wait_until(lambda: set(kept_by(model)) == before, 10, lambda: str(kept_by(model)))


def test_an_upload_that_is_cut_off_leaves_nothing(server: Server, model: Path) -> None:
    before = set(kept_by(model))
    visitor = Visitor(server[0])
    cookie = "; ".join(f"{name}={value}" for name, value in visitor.client.cookies.items())
    host, port = server[0].removeprefix("http://").split(":")
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nCookie: {cookie}\r\n"
    head += "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 9000000\r\n\r\n"
    head += '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + bytes(5_000_000))
        assert last(visitor.ask("Are you there?"))
    assert last(visitor.ask("And now?"))
    assert set(kept_by(model)) == before


def test_a_cookie_that_was_made_up_uploads_nothing(server: Server, model: Path, red: Path) -> None:
    visitor = Visitor(server[0])
    (name,) = visitor.client.cookies
    before = set(kept_by(model))
    for made_up in ("x", "0" * 32 + "." + "0" * 64, "", "."):
        reply = httpx.post(
            f"{server[0]}/gradio_api/upload", files={"files": red.read_bytes()}, headers={"Cookie": f"{name}={made_up}"}
        )
        assert reply.status_code == 403 and "cookie of this page" in reply.json()["detail"]
    assert set(kept_by(model)) == before


def test_cookies_of_other_sites_are_in_nobodys_way(server: Server, red: Path) -> None:
    visitor = Visitor(server[0])
    ((name, value),) = visitor.client.cookies.items()
    others = f'qllava=theirs; bad{{}}=[x"; {name}=theirs; {name}={value}; json={{"a": "b;c"}}'
    reply = httpx.post(f"{server[0]}/gradio_api/upload", files={"files": red.read_bytes()}, headers={"Cookie": others})
    assert reply.is_success and len(reply.json()) == 1


def test_another_name_of_this_machine_is_refused(server: Server, red: Path) -> None:
    visitor = Visitor(server[0])
    port = server[0].rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", f"0.0.0.0:{port}"):
        for path in ("/", "/config", "/gradio_api/upload"):
            reply = httpx.get(server[0] + path, headers={"Host": host})
            assert reply.status_code == 421 and "set-cookie" not in reply.headers, (host, path)
            assert f"http://127.0.0.1:{port}" in reply.json()["detail"]
    assert httpx.get(server[0], headers={"Host": f"localhost:{port}"}).is_success
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{int(port) + 1}"):
        files = {"files": red.read_bytes()}
        reply = visitor.client.post("/gradio_api/upload", files=files, headers={"Origin": origin})
        assert reply.status_code == 403 and "other sites" in reply.json()["detail"]
    files = {"files": red.read_bytes()}
    assert visitor.client.post("/gradio_api/upload", files=files, headers={"Origin": server[0]}).is_success


def test_a_message_makes_gradio_fetch_nothing(server: Server, model: Path) -> None:
    visitor = Visitor(server[0])
    before = set(kept_by(model))
    for path in ("http://127.0.0.1:9/x.png", "https://example.com/x.png", "data:image/png;base64,AAAA"):
        assert visitor.ask("What is it?", path) == [] and "another visitor" in visitor.refused
    assert set(kept_by(model)) == before


def test_nobody_reads_what_another_has_uploaded(server: Server, red: Path) -> None:
    mine, other = Visitor(server[0]), Visitor(server[0])
    path = uploaded(mine, red)
    assert other.client.get(f"/gradio_api/file={path}").status_code == 403
    assert httpx.get(f"{server[0]}/gradio_api/file={path}").status_code == 403
    for spelled in (path, path.replace("/uploads", "/../" + path.split("/")[2] + "/uploads")):
        assert other.ask("What is it?", spelled) == [] and "another visitor" in other.refused
        assert (
            other.press("question-camera", "input", [other.file(spelled), None]) == []
            and "another visitor" in other.refused
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
    asked, left, right, *_ = visitor.ask("Which?", box="pair")
    assert texts(asked, "user") == ["Which?"] and not texts(left, "user") and not texts(right, "user"), "once"
    again = visitor.answer("pair")
    assert "already answered" in last(again)
    assert visitor.press("vote-left", "click") == [] or "Left was" not in visitor.refused


def test_an_image_that_is_sent_twice_is_two_images(server: Server, red: Path) -> None:
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


def test_a_vote_is_a_line_with_its_image_beside_it(server: Server, model: Path, red: Path) -> None:
    visitor = Visitor(server[0])
    votes = model.parent / "votes.jsonl"
    before = len(VoteFile(votes).votes)
    _, left, right, *_ = visitor.ask("Which?", uploaded(visitor, red), box="pair")
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
        assert last(visitor.ask("")) == "The question is empty. Write a question.", "it goes on"


def test_a_hundred_wait_and_the_next_is_refused(tmp_path: Path) -> None:
    with served(endless_model(tmp_path / "model"), watched=True) as (address, process):
        visitor = Visitor(address)
        visitor.press("question", "submit", [{"text": "One", "files": []}])
        visitor.answer("question", wait=False)
        wait_until(lambda: computes(process, tmp_path), 60)
        for _ in range(MAX_WAITING):
            visitor.answer("question", wait=False)
            assert not visitor.refused
        visitor.answer("question", wait=False)
        assert f"Max size is {MAX_WAITING}" in visitor.refused and MAX_WAITING == 100


def test_closing_the_page_ends_the_models_thread_and_deletes_its_images(tmp_path: Path, red: Path) -> None:
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
