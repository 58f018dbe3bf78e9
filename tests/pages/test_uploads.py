"""Cookies, hosts, quotas and the vote before its names: the demo's parts without a server."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from starlette.requests import ClientDisconnect, Request

from qllava.config import InputError
from qllava.pages.access import MAX_NEW, Cookies, Hosts
from qllava.pages.compare import ENOUGH, Compare, tally_bar
from qllava.pages.uploads import Quota, TooMuch, Uploads
from qllava.pages.visitors import Visitors
from qllava.voting.duel import Contender, Duel
from qllava.voting.votes import Tally, VoteFile
from tests.tiny_models import make_image

BOUNDARY = b"x"


def form(*files: bytes) -> bytes:
    """A form with files, as a browser sends it."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="photo.jpg"\r\n\r\n'
    return b"".join(head + file + b"\r\n" for file in files) + b"--x--\r\n"


def request(body: bytes, *, whole: bool = True) -> Request:
    """An upload, or the part of one that arrived before the connection broke."""
    messages: Iterator[dict[str, Any]] = iter(
        [{"type": "http.request", "body": body, "more_body": not whole}, {"type": "http.disconnect"}]
    )

    async def receive() -> dict[str, Any]:
        return next(messages)

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


def send(uploads: Uploads, owner: str, *files: bytes) -> list[Path]:
    body = form(*files)
    return asyncio.run(uploads.receive(owner, request(body), len(body)))


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def photo() -> bytes:
    data = io.BytesIO()
    make_image("red", (60, 40)).save(data, "jpeg")
    return data.getvalue()


def test_only_cookies_that_were_issued_have_an_owner() -> None:
    cookies = Cookies()
    first, second = cookies.issue(), cookies.issue()
    assert first and second
    owners = {cookies.owner(f"{cookies.name}={value}") for value in (first, second)}
    assert len(owners) == 2 and None not in owners
    token = first.partition(".")[0]
    for value in ("", token, f"{token}.", f"{token}.{'0' * 64}", second.replace(second[0], "é"), first.upper()):
        assert cookies.owner(f"{cookies.name}={value}") is None
    assert cookies.owner(None) is None and cookies.owner(f"qllava={first}") is None
    assert Cookies().owner(f"{cookies.name}={first}") is None, "of another process"
    assert cookies.owner(f'a="; {cookies.name}=x;; {cookies.name}={first} ; b') in owners


def test_files_are_counted_while_others_remove_theirs(
    tmp_path: Path, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by twenty visitors at once: the count met a folder that was removed as it was looked into."""
    uploads = Uploads(tmp_path)
    for owner in ("first", "second", "third"):
        send(uploads, owner, photo)
    look, there = os.scandir, {owner: uploads.used(owner) for owner in ("first", "third")}

    def scandir(path: Any) -> Any:
        if str(path) == str(tmp_path / "second" / "uploads"):
            shutil.rmtree(path)
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert uploads.used() == (2, sum(size for _, size in there.values()))
    assert not (tmp_path / "second" / "uploads").exists()


def test_new_visitors_are_limited_by_the_minute() -> None:
    now = [0.0]
    cookies = Cookies(lambda: now[0])
    assert all(cookies.issue() for _ in range(MAX_NEW)) and cookies.issue() is None
    now[0] = 61
    assert cookies.issue()


def test_the_shared_address_is_accepted_once_it_is_known() -> None:
    hosts = Hosts(7860)
    public = {"host": "name.gradio.live", "origin": "https://name.gradio.live"}
    assert hosts.refuses(public)
    hosts.share("https://name.gradio.live")
    assert hosts.refuses(public) is None
    assert hosts.refuses({"host": "other.gradio.live"})
    assert hosts.refuses({"host": "localhost:7860", "sec-fetch-site": "cross-site"})


def test_a_quota_bounds_files_and_bytes_of_one_and_of_all(tmp_path: Path, photo: bytes) -> None:
    uploads = Uploads(tmp_path, Quota(files=2, size=10**6), Quota(files=3, size=10**6))
    send(uploads, "anna", photo, photo)
    with pytest.raises(TooMuch, match="Your images have reached the limit of 2 images"):
        send(uploads, "anna", photo)
    send(uploads, "ben", photo)
    with pytest.raises(TooMuch, match="of all visitors have reached"):
        send(uploads, "cleo", photo)
    assert len(files_in(tmp_path)) == 3 and uploads.used("anna")[0] == 2
    small = Uploads(tmp_path / "small", Quota(files=9, size=len(photo) + 300), Quota(files=9, size=10**6))
    with pytest.raises(TooMuch):  # by what it announces, before it is read
        asyncio.run(small.receive("anna", request(b""), len(photo) + 301))
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 100).convert("RGB").save(noise, "jpeg", quality=1)
    with pytest.raises(TooMuch):  # by what its pixels take
        send(small, "anna", noise.getvalue())
    assert not files_in(tmp_path / "small")


def test_what_arrives_at_the_same_time_is_counted_together(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, Quota(files=9, size=1000), Quota(files=9, size=10**6))

    async def both() -> None:
        arrived = asyncio.Event()

        async def receive() -> dict[str, Any]:
            arrived.set()
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        stalled = request(b"")
        first = asyncio.create_task(uploads.receive("anna", Request(stalled.scope, receive), 600))
        await arrived.wait()
        with pytest.raises(TooMuch):
            await uploads.receive("anna", request(b""), 600)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(both())
    assert uploads.used() == (0, 0)


@pytest.mark.parametrize("cut", [0, 70, 200])
def test_an_upload_that_is_cut_off_is_removed(tmp_path: Path, photo: bytes, cut: int) -> None:
    uploads = Uploads(tmp_path)
    body = form(photo, photo)[: len(form(photo)) + cut]
    with pytest.raises(ClientDisconnect):
        asyncio.run(uploads.receive("anna", request(body, whole=False), len(body)))
    assert not list(tmp_path.rglob("*")) and uploads.used() == (0, 0)


def test_one_bad_file_of_an_upload_keeps_none_of_it(tmp_path: Path, photo: bytes) -> None:
    with pytest.raises(InputError, match=r"^photo\.jpg is not an image"):
        send(Uploads(tmp_path), "anna", photo, b"Dear reader")
    for body in (b"--x\r\nno form", form(*[photo] * 9)):
        with pytest.raises(InputError, match="cannot be read"):
            asyncio.run(Uploads(tmp_path).receive("anna", request(body), len(body)))
    assert not list(tmp_path.rglob("*"))


def test_an_upload_goes_when_all_pages_are_closed_that_can_have_sent_it(tmp_path: Path, photo: bytes) -> None:
    uploads = Uploads(tmp_path)
    first = uploads.opened("anna", "first")
    (early,) = send(uploads, "anna", photo)
    second, other = uploads.opened("anna", "second"), uploads.opened("ben", "third")
    (late,) = send(uploads, "anna", photo)
    uploads.closed(other)
    assert early.is_file() and late.is_file()
    uploads.closed(first)
    assert not early.is_file() and late.is_file()
    uploads.closed(second)
    assert not list(tmp_path.rglob("*"))


def test_an_upload_that_arrives_after_its_page_was_closed_is_removed(
    tmp_path: Path, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads(tmp_path)
    page = uploads.opened("anna", "first")
    keep = uploads._keep

    def slow(owner: str, file: Any) -> Path:
        uploads.closed(page)
        return keep(owner, file)

    monkeypatch.setattr(uploads, "_keep", slow)
    send(uploads, "anna", photo)
    assert not list(tmp_path.rglob("*"))


def test_what_belongs_to_no_page_goes_after_a_while(
    tmp_path: Path, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads, cookies = Uploads(tmp_path), Cookies()
    visitors = Visitors(uploads, cookies)
    asking = asks(cookies)
    visitor = visitors.of(asking)
    visitors.take(visitor, [str(path) for path in send(uploads, visitor.owner, photo)])
    send(uploads, visitor.owner, photo)
    visitors.sweep()
    assert len(files_in(tmp_path)) == 2
    monkeypatch.setattr("qllava.pages.uploads.PAGELESS", -1)
    monkeypatch.setattr("qllava.pages.visitors.PAGELESS", -1)
    page = uploads.opened(visitor.owner, "page")
    visitors.sweep()
    assert visitors.of(asking) is visitor, "its page is open"
    uploads.closed(page)
    visitors.sweep()
    assert not list(tmp_path.rglob("*"))


def asks(cookies: Cookies) -> Any:
    """What a handler gets of the request of a new visitor."""
    return SimpleNamespace(headers={"cookie": f"{cookies.name}={cookies.issue()}"}, session_hash="page", username=None)


def test_no_name_is_shown_before_its_vote_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request of the same page may come while the vote is written, and the write may fail."""
    chat: Any = SimpleNamespace(name="model")
    cookies = Cookies()
    visitors, votes = Visitors(Uploads(tmp_path), cookies), VoteFile(tmp_path / "votes.jsonl")
    compare, asking = Compare((chat, chat), visitors, votes, None, []), asks(cookies)
    visitor = visitors.of(asking)
    visitor.duel = Duel((Contender(chat, 0.0, "secret one"), Contender(chat, 0.8, "secret two")), 1)
    visitor.duel.whole = True
    seen: list[str] = []
    append = votes.append

    def failing(vote: Any) -> None:
        seen.append(str(compare.stop(asking)))
        raise InputError("The disk is full.")

    monkeypatch.setattr(votes, "append", failing)
    with pytest.raises(Exception, match="disk is full"):
        compare.vote("left", asking)
    seen.append(str(compare.stop(asking)))
    assert len(seen) == 2 and not any("secret" in view for view in seen)
    visitor.duel.stopped.clear()
    monkeypatch.setattr(votes, "append", append)
    assert "secret one" in str(compare.vote("left", asking)) and len(votes.votes) == 1


def test_the_tally_is_a_bar_from_ten_votes_on() -> None:
    assert ENOUGH == 10 and tally_bar(Tally(("a", "b"), (5, 2), 1, 1), ("a", "b")) == ""
    drawn = tally_bar(Tally(("<a>", "b"), (6, 2), 1, 1), ("<a>", "b"))
    assert "&lt;a&gt; better: 6" in drawn and "<a>" not in drawn and "10 votes" in drawn and "75 %" in drawn
    assert drawn.count("flex-grow") == 4
    undecided = tally_bar(Tally(("a", "b"), (0, 0), 10, 0), ("a", "b"))
    assert "interval" not in undecided and undecided.count("flex-grow") == 1
