"""Store of calls to a language model by their content, so that no answered call is ever paid again.

    calls.jsonl    {"key": "3f0c...", "model": ..., "version": ..., "reply": {"text": ..., ...}}
                   {"key": "71aa...", "model": ..., "version": ..., "failed": "status 400: ...", "requests": 1}

There is a line for each reply, appended and flushed to the disk before the reply is used; and one for each call that
failed, so that the next run sends it after all others. `requests` and `lost_tokens` are what was spent, with failed
attempts, if that is more than one request.

The key is a hash of model, version of the prompt, messages and parameters: another prompt is another call, and the same
call is found by every command. A process that is stopped at any moment leaves complete lines and at most one truncated
line, at the end, which is removed when the file is opened next. A corrupt line anywhere else is an error: the file was
edited.

One process writes at a time. The lock is on a hidden file next to the store, so that deleting the store does not let a
second process in, and on the store itself, which may have several names. Both locks end with their process in any case.
A store that is deleted while it is in use is written again completely with the next reply.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from filelock import Timeout

from qllava.config import InputError
from qllava.files import Journal
from qllava.locks import Lock

Message: TypeAlias = dict[str, Any]

_ADVICE = "wait until that process ends, or give this run another file with --store"
_LONGEST_LINE = 1 << 32  # bytes


@dataclass(frozen=True)
class Call:
    """A call to a language model."""

    model: str
    """Name of the model."""
    messages: tuple[Message, ...]
    """Messages as in the chat API, {"role", "content"}, with content as text or parts."""
    parameters: Mapping[str, Any]
    """Further fields of the request: temperature, max_tokens, response_format, ..."""
    version: str
    """Version of the prompt; a new version makes a new call."""

    @cached_property
    def key(self) -> str:
        """Hash of the content, 64 hexadecimal digits."""
        content = [self.model, self.version, list(self.messages), dict(self.parameters)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def body(self) -> dict[str, Any]:
        """Return the body of the request to /chat/completions."""
        return {"model": self.model, "messages": list(self.messages), **self.parameters}


@dataclass(frozen=True)
class Reply:
    """A reply of a language model."""

    text: str
    """Text of the reply."""
    finish_reason: str
    """Reason why the reply ended: "stop"; "length" if it was truncated; "unreadable" if `text` is an invalid body."""
    prompt_tokens: int
    """Number of tokens of the prompt."""
    completion_tokens: int
    """Number of tokens of the reply."""
    refusal: str | None = None
    """The API's own field for a refusal; None if it is absent."""


@dataclass
class Spent:
    """Cost of a call."""

    requests: int = 0
    """Number of requests that were sent, and may have been answered."""
    lost_tokens: int = 0
    """Number of tokens that were paid for, or may have been, without a reply that could be stored."""


class Store:
    """Replies in one file; `with Store(path) as store` opens, locks and finally releases it.

    The attributes `calls` and `tokens` are the number of stored replies and their cost by the server's count;
    `requests` and `spent_tokens` are the number of all requests and their cost, including failed attempts.
    """

    def __init__(self, path: Path) -> None:
        """Open or create a file.

        Raises:
            InputError: The file is in use, cannot be written, or is not a store.
        """
        self.path = path
        self.calls = self.tokens = 0
        self.requests = self.spent_tokens = 0
        self._places: dict[str, int] = {}  # start and length of each key's line, as one number to save memory
        self._failures: Counter[str] = Counter()
        self._end = 0
        self._writing = threading.Lock()
        with ExitStack() as held:
            held.callback(_take_lock(path).free)
            self._journal = held.enter_context(_open(path))
            try:
                self._read(self._journal)
            except OSError as error:
                raise _no_place(path, error) from error
            self._held = held.pop_all()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def close(self) -> None:
        """Release the file."""
        self._held.close()

    def get(self, key: str) -> Reply | None:
        """Return the stored reply to the call with this key, or None."""
        place = self._places.get(key)
        if place is None:
            return None
        return _record(self._journal.read(place // _LONGEST_LINE, place % _LONGEST_LINE)).reply

    @property
    def failed(self) -> int:
        """Number of failures of all calls."""
        return self._failures.total()

    def failures(self, key: str) -> int:
        """Return how often a call has failed, in this run and earlier ones."""
        return self._failures[key]

    def add(self, *answered: tuple[Call, Reply], spent: Spent | None = None) -> None:
        """Store replies on the disk, except for calls that have one already; may be called by threads.

        Args:
            answered: Calls with their replies.
            spent: Cost of each of them besides the reply; None for one request.

        Raises:
            InputError: The disk is full; then the file contains none of these replies.
        """
        spent = spent or Spent(requests=1)
        with self._writing:
            new: dict[str, tuple[bytes, _Record]] = {}
            for call, reply in answered:
                if call.key not in self._places and call.key not in new:
                    record = _Record(call.key, reply, None, spent.requests, spent.lost_tokens)
                    new[call.key] = (_line(call, record), record)
            self._append(*new.values())

    def fail(self, call: Call, reason: str | None, spent: Spent) -> None:
        """Store the failure of a call and its cost; `reason` is None if the call was only interrupted."""
        with self._writing:
            record = _Record(call.key, None, reason, spent.requests, spent.lost_tokens)
            self._append((_line(call, record), record))

    def _append(self, *records: tuple[bytes, _Record]) -> None:
        try:
            if not self._journal.restore():  # deleted; the lock ensures that no other run has made a new one
                raise InputError(
                    f"{self.path} was replaced by another file during the run; run the command again, which asks "
                    "only for missing replies."
                )
            self._journal.append(b"".join(line for line, _ in records))
        except OSError as error:
            raise InputError(
                f"{self.path}: a reply cannot be written ({error.strerror}); free disk space and run the command again."
            ) from error
        for line, record in records:
            self._note(record, len(line))

    def _read(self, journal: Journal) -> None:
        """Index every reply, and remove a truncated line at the end, which a killed process leaves."""
        for number, line in enumerate(journal.lines(), start=1):
            try:
                record = _record(line)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(
                    f"{self.path}, line {number}: this line is not a stored reply ({error}); "
                    "remove the line, and the call will be sent again."
                ) from error
            self._note(record, len(line))
        journal.mend()

    def _note(self, record: _Record, length: int) -> None:
        """Index a line at the end; of two replies to one call (in concatenated files) the first counts."""
        if record.key not in self._places or record.reply is None:
            self.requests += record.requests
            self.spent_tokens += record.lost_tokens
            if record.failed is not None:
                self._failures[record.key] += 1
            if record.reply is not None:
                self._places[record.key] = self._end * _LONGEST_LINE + length
                cost = record.reply.prompt_tokens + record.reply.completion_tokens
                self.calls += 1
                self.tokens += cost
                self.spent_tokens += cost
        self._end += length


@dataclass(frozen=True)
class _Record:
    """A line of the file."""

    key: str
    """Key of the call."""
    reply: Reply | None
    """Reply to the call; None if it failed."""
    failed: str | None
    """Reason of the failure; None if there is a reply, or the call was interrupted."""
    requests: int
    """Number of requests that were sent."""
    lost_tokens: int
    """Number of tokens that were spent without a reply."""


def _line(call: Call, record: _Record) -> bytes:
    # Without the messages: a hundred thousand calls repeat their instructions, and a command can rebuild them.
    kept: dict[str, Any] = {"key": call.key, "model": call.model, "version": call.version}
    if record.reply is not None:
        kept["reply"] = asdict(record.reply)
    if record.failed is not None:
        kept["failed"] = record.failed
    if record.requests != 1 or record.reply is None:
        kept["requests"] = record.requests
    if record.lost_tokens:
        kept["lost_tokens"] = record.lost_tokens
    return json.dumps(kept, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _record(line: bytes) -> _Record:
    """Parse a line, or raise ValueError, KeyError, TypeError or RecursionError for an invalid one."""
    read = json.loads(line)
    key, failed = read["key"], read.get("failed")
    requests, lost = read.get("requests", 1), read.get("lost_tokens", 0)
    numbers = [requests, lost]
    # A call that failed or was interrupted has no reply, but has its cost.
    reply = Reply(**read["reply"]) if "reply" in read or "requests" not in read else None
    if not (isinstance(key, str) and isinstance(failed, str | None)):
        raise TypeError("key and failed must be text")
    if reply is not None:
        if not isinstance(reply.text, str):
            raise TypeError("text must be text")
        numbers += [reply.prompt_tokens, reply.completion_tokens]
    if not all(isinstance(number, int) for number in numbers):
        raise TypeError("tokens and requests must be whole numbers")
    return _Record(key, reply, failed, requests, lost)


def _take_lock(path: Path) -> Lock:
    """Lock a hidden file next to a store, the same file for every symbolic link to the store.

    Raises:
        InputError: Another process holds the lock, or the file cannot be created.
    """
    lock = Lock.beside(path)
    try:
        lock.take(str(path), _ADVICE)
    except OSError as error:
        raise _no_place(path, error) from error
    return lock


def _open(path: Path) -> Journal:
    """Open and lock a store, which may have several names; raise InputError if another process holds it."""
    try:
        return Journal(path, begins=b'{"key": ', hold=0)
    except Timeout as error:
        raise InputError(f"{path} is in use by another process; {_ADVICE}.") from error
    except OSError as error:
        raise _no_place(path, error) from error


def _no_place(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: the replies cannot be stored in this file ({error.strerror}); choose another file.")
