"""Calls to a language model, kept by their content, so that none that was answered is ever paid again.

    calls.jsonl    {"key": "3f0c...", "model": ..., "version": ..., "reply": {"text": ..., ...}}
                   {"key": "71aa...", "model": ..., "version": ..., "failed": "status 400: ...", "requests": 1}

A line for each reply, appended and flushed to the disk before the reply is used; and one for each call that failed, so
that the next run asks it after all others. `requests` and `lost_tokens` say what was spent where that is not one
request: by attempts that failed.

The key is a hash of model, version of the prompt, messages and parameters: another prompt is another call, and the
same call is found again whoever asks it. Stopping a process at any moment leaves whole lines and at most one torn one,
at the end, which is cut when the file is opened next. A broken line anywhere else is an error: somebody edited it.

One process writes at a time. The lock is on a hidden file beside the store, so that deleting the store does not let a
second process in, and on the store itself, which may have several names. Both end with their process, however that
ends. A store that is deleted while it is in use is written again, as a whole, with the next reply.
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
    """What a language model is asked."""

    model: str
    messages: tuple[Message, ...]  # {"role", "content"}, as the chat API has them: text, or parts
    parameters: Mapping[str, Any]  # further fields of the request: temperature, max_tokens, response_format, ...
    version: str  # of the prompt; a new one asks again

    @cached_property
    def key(self) -> str:
        """64 hexadecimal digits that identify the content."""
        content = [self.model, self.version, list(self.messages), dict(self.parameters)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def body(self) -> dict[str, Any]:
        """The request, as /chat/completions takes it."""
        return {"model": self.model, "messages": list(self.messages), **self.parameters}


@dataclass(frozen=True)
class Reply:
    """What it answered."""

    text: str
    finish_reason: str  # "stop"; "length" when it was cut off; "unreadable" when `text` is not what the API promises
    prompt_tokens: int
    completion_tokens: int
    refusal: str | None = None  # the API's own field for a refusal


@dataclass
class Spent:
    """What a call has cost."""

    requests: int = 0
    """Requests that were sent, and may have been answered."""
    lost_tokens: int = 0
    """Tokens that were paid, or may have been, without a reply that could be kept."""


class Store:
    """The replies of one file; `with Store(path) as store` opens, locks and in the end releases it.

    calls, tokens: how many replies are kept, and what they cost by the server's count.
    requests, spent_tokens: all that was sent, and what that cost, attempts that failed included.
    """

    def __init__(self, path: Path) -> None:
        """Open or begin a file. Raises InputError when it is in use, cannot be written, or is not such a file."""
        self.path = path
        self.calls = self.tokens = 0
        self.requests = self.spent_tokens = 0
        self._places: dict[str, int] = {}  # key -> where the line begins, and its length, as one number: they are many
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
        """The reply to a call, if it was ever given."""
        place = self._places.get(key)
        if place is None:
            return None
        return _record(self._journal.read(place // _LONGEST_LINE, place % _LONGEST_LINE)).reply

    @property
    def failed(self) -> int:
        """How often any call has failed."""
        return self._failures.total()

    def failures(self, key: str) -> int:
        """How often a call has failed, in this run and earlier ones."""
        return self._failures[key]

    def add(self, *answered: tuple[Call, Reply], spent: Spent | None = None) -> None:
        """Keep replies; on return they are on the disk. A call that has one already keeps it. May be called by threads.

        Args:
            answered: Calls with their replies.
            spent: What each of them has cost beside the reply; None for one request.

        Raises:
            InputError: The disk is full; nothing of these replies is then left in the file.
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
        """Keep that a call failed, and what it has cost; without a reason it was only broken off."""
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
                f"{self.path}: a reply cannot be written ({error.strerror}); make room and start again."
            ) from error
        for line, record in records:
            self._note(record, len(line))

    def _read(self, journal: Journal) -> None:
        """Note where every reply lies, and cut what a process that was stopped while writing has left at the end."""
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
        """Note a line at the end; of two replies to one call (files put together) the first counts."""
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
    reply: Reply | None
    failed: str | None
    requests: int
    lost_tokens: int


def _line(call: Call, record: _Record) -> bytes:
    # Not the messages: a hundred thousand calls repeat their instructions, and whoever asks again can make them again.
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
    """What a line holds. Raises ValueError, KeyError, TypeError or RecursionError for anything else."""
    read = json.loads(line)
    key, failed = read["key"], read.get("failed")
    requests, lost = read.get("requests", 1), read.get("lost_tokens", 0)
    numbers = [requests, lost]
    # What only broke off, or failed, has no reply, and says what it has cost.
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
    """Lock a hidden file beside a store, the same for every name that links lead from.

    Raises:
        InputError: Another process has it, or it cannot be made.
    """
    lock = Lock.beside(path)
    try:
        lock.take(str(path), _ADVICE)
    except OSError as error:
        raise _no_place(path, error) from error
    return lock


def _open(path: Path) -> Journal:
    """Open a store and hold it, as it may have several names. Raises InputError when another process holds it."""
    try:
        return Journal(path, begins=b'{"key": ', hold=0)
    except Timeout as error:
        raise InputError(f"{path} is in use by another process; {_ADVICE}.") from error
    except OSError as error:
        raise _no_place(path, error) from error


def _no_place(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: the replies cannot be stored in this file ({error.strerror}); choose another place.")
