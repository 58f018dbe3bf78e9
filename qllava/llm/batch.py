"""Calls through batch files, which vLLM's `run-batch` or a hosted batch API answers.

    requests   {"custom_id": KEY, "method": "POST", "url": "/v1/chat/completions", "body": {"model", "messages", ...}}
    results    {"custom_id": KEY, "response": {"status_code": 200, "body": {...}}, "error": null}

`custom_id` is the key of the store, so results may come in any order, in several files, and twice. A reply that breaks
a rule needs one more call, which is in a second export.

A hosted batch takes 50,000 requests and 200 MB per file (OpenAI's Batch API; others take as much or more). Larger
exports become several files: requests-00001.jsonl, requests-00002.jsonl, ... instead of requests.jsonl.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qllava.config import InputError
from qllava.data.problems import Place
from qllava.data.records import read_records
from qllava.files import aside, move, unwritable
from qllava.llm.completions import error_of, read_json, read_reply
from qllava.llm.store import Call, Reply, Store

MOST_REQUESTS = 50_000
"""Maximum number of requests in one file."""
MOST_BYTES = 200_000_000
"""Maximum size of one file in bytes."""

_AT_ONCE = 1000  # number of replies that are flushed to the disk together


@dataclass(frozen=True)
class Exported:
    """Requests that were written for a batch."""

    calls: int
    """Number of distinct requests."""
    files: tuple[Path, ...]
    """Files of the requests; one empty file if there are none."""


@dataclass(frozen=True)
class Imported:
    """Numbers of results in imported files."""

    replies: int
    """Number of new replies, which are now stored."""
    known: int
    """Number of replies that were stored before or repeat an earlier line."""
    failed: int
    """Number of requests that the server could not answer; the next export contains them again."""
    foreign: int
    """Number of results for other images, prompts or settings than those of this command."""


def write_requests(path: Path, calls: Iterable[Call]) -> Exported:
    """Write requests, each once, to one file or several; every file is written completely or not at all.

    Numbered files of an earlier export to the same path are removed, so that they are not sent again.

    Args:
        path: The file; if one is not enough, numbers are appended to its name.
        calls: Calls to write.

    Raises:
        InputError: A file cannot be written.
    """
    files = _Files(path)
    seen: set[bytes] = set()
    try:
        try:
            for call in calls:
                if (key := bytes.fromhex(call.key)) not in seen:
                    seen.add(key)
                    files.write(json.dumps(_request(call), ensure_ascii=False).encode() + b"\n")
            return Exported(len(seen), files.finish())
        finally:
            files.discard()
    except OSError as error:
        raise unwritable(path, error) from error


class _Files:
    """Writer of several files, one after the other, under temporary names, which are renamed together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: BinaryIO | None = None
        self._aside = ExitStack()
        self._parts: list[Path] = []
        self._lines = self._size = 0
        self._begin()

    def write(self, line: bytes) -> None:
        """Write a line, into a new file if the current one is full."""
        if self._lines and (self._lines == MOST_REQUESTS or self._size + len(line) > MOST_BYTES):
            self._begin()
        assert self._open is not None
        self._open.write(line)
        self._lines, self._size = self._lines + 1, self._size + len(line)

    def finish(self) -> tuple[Path, ...]:
        """Rename the files to their final names, and remove those of an earlier export."""
        self._close()
        several = len(self._parts) > 1
        files = [self._numbered(number) if several else self.path for number in range(1, len(self._parts) + 1)]
        pattern = re.compile(rf"{re.escape(self.path.stem)}-\d{{5}}{re.escape(self.path.suffix)}")
        there = {one for one in self.path.parent.iterdir() if pattern.fullmatch(one.name)}
        for part, file in zip(self._parts, files, strict=True):
            move(part, file)
        for old in (there | {self.path}) - set(files):
            old.unlink(missing_ok=True)
        return tuple(files)

    def discard(self) -> None:
        """Remove files that are not renamed yet."""
        self._close()
        self._aside.close()

    def _begin(self) -> None:
        self._close()
        self._lines = self._size = 0
        part = self._aside.enter_context(aside(self.path))
        self._open = part.open("wb")
        self._parts.append(part)

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.stem}-{number:05d}{self.path.suffix}")

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def read_results(paths: Sequence[Path], call_of: Callable[[str], Call | None], store: Store) -> Imported:
    """Store the replies to the wanted calls, with one line and a few replies in memory at a time.

    Args:
        paths: Files of results.
        call_of: Function from a key to the wanted call; None for any other key.
        store: Store of the replies.

    Raises:
        InputError: A line is not a result, or nothing in a file belongs to this command.
    """
    total = Imported(0, 0, 0, 0)
    for path in paths:
        found = _read_file(path, call_of, store)
        total = Imported(*(a + b for a, b in zip(_numbers(total), _numbers(found), strict=True)))
    return total


def _read_file(path: Path, call_of: Callable[[str], Call | None], store: Store) -> Imported:
    replies = known = failed = foreign = 0
    new: dict[str, tuple[Call, Reply]] = {}
    try:
        for key, body in _results(path):
            if key in store or key in new:
                known += 1
            elif (call := call_of(key)) is None:
                foreign += 1
            elif body is None:
                failed += 1
            else:
                new[key] = (call, read_reply(body, call))
                replies += 1
                if len(new) == _AT_ONCE:
                    store.add(*new.values())
                    new.clear()
    finally:  # replies before a line that is not a result are stored too
        store.add(*new.values())
    if foreign and not (replies or known or failed):
        raise InputError(
            f"{path}: none of its {foreign} results belongs to a call of this command; give the contexts, teacher, "
            "types, "
            "prompts and parameters with which the requests were written."
        )
    return Imported(replies, known, failed, foreign)


def _numbers(one: Imported) -> tuple[int, int, int, int]:
    return one.replies, one.known, one.failed, one.foreign


def _request(call: Call) -> dict[str, Any]:
    return {"custom_id": call.key, "method": "POST", "url": "/v1/chat/completions", "body": call.body()}


def _results(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield key and body of every result; the body is None if the request failed."""
    for place, row in read_records(path):
        yield _result(row, place)


def _result(row: Any, place: Place) -> tuple[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str) or "response" not in row:
        raise InputError(
            f"{place}: this line is not a result of a batch API; each line needs the fields custom_id and response."
        )
    response = row["response"]
    answered = isinstance(response, dict) and response.get("status_code", 200) == 200 and not row.get("error")
    body = response.get("body") if answered else None
    # An error may come with status 200, and in a body that is text.
    if error_of(read_json(body) if isinstance(body, str) else body) is not None:
        body = None
    return row["custom_id"], body
