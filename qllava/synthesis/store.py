"""Calls to a language model, kept by their content, so that none that was answered is ever paid again.

    calls.jsonl    {"key": "3f0c...", "model": ..., "version": ..., "reply": {"text": ..., ...}}
                   a line a reply, appended and flushed to the disk before the reply is used

The key is a hash of model, version of the prompt, messages and parameters: another prompt is another call, and the
same call is found again whoever asks it. Stopping a process at any moment leaves whole lines and at most one torn one,
at the end, which is cut when the file is opened next. A broken line anywhere else is an error: somebody edited it.

One process writes at a time. The lock belongs to the open file, so it ends with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from qllava.config import InputError

Message: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """What a language model is asked."""

    model: str
    messages: tuple[Message, ...]  # {"role", "content"}, as the chat API has them: text, or parts
    parameters: Mapping[str, Any]  # further fields of the request: temperature, max_tokens, response_format, ...
    version: str  # of the prompt; a new one asks again

    @cached_property
    def key(self) -> str:
        """64 hexadecimal digits that stand for the content."""
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


class Store:
    """The replies of one file; `with Store(path) as store` opens, locks and in the end releases it.

    calls, tokens: how many replies are kept, and what they cost by the server's count.
    """

    def __init__(self, path: Path) -> None:
        """Open or begin a file. Raises InputError when it is in use, cannot be written, or is not such a file."""
        self.path = path
        self.calls = 0
        self.tokens = 0
        self._places: dict[str, tuple[int, int]] = {}  # key -> where the line begins, and its length
        self._end = 0
        self._writing = threading.Lock()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise InputError(
                f"{path}: the replies cannot be kept here ({error.strerror}); choose another place."
            ) from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        os.close(self._file)

    def get(self, key: str) -> Reply | None:
        """The reply to a call, if it was ever given."""
        place = self._places.get(key)
        return None if place is None else _record(os.pread(self._file, place[1], place[0]))[1]

    def add(self, *answered: tuple[Call, Reply]) -> None:
        """Keep replies; on return they are on the disk. A call that has one already keeps it. May be called by threads.

        Raises InputError when the disk is full; nothing of these replies is then left in the file.
        """
        with self._writing:
            new: dict[str, tuple[bytes, Reply]] = {}
            for call, reply in answered:
                if call.key not in self._places and call.key not in new:
                    new[call.key] = (_line(call, reply), reply)
            try:
                rest = memoryview(b"".join(line for line, _ in new.values()))
                while rest:
                    rest = rest[os.write(self._file, rest) :]
                os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, self._end)
                raise InputError(
                    f"{self.path}: a reply cannot be written ({error.strerror}); make room and start again."
                ) from error
            for key, (line, reply) in new.items():
                self._note(key, len(line), reply)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{self.path} is in use by another run; wait for its end, or give this one a file of its own."
            ) from error

    def _read(self) -> None:
        """Note where every reply lies, and cut what a process that was stopped while writing has left at the end."""
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                try:
                    key, reply = _record(line)
                except (ValueError, KeyError, TypeError) as error:
                    if not line.endswith(b"\n"):
                        break
                    raise InputError(
                        f"{self.path}, line {number}: this is not a reply that was kept ({error}); "
                        "remove the line, and its call will be asked again."
                    ) from error
                if not line.endswith(b"\n"):  # whole, but for the last byte
                    os.write(self._file, b"\n")
                    line += b"\n"
                self._note(key, len(line), reply)
        os.ftruncate(self._file, self._end)

    def _note(self, key: str, length: int, reply: Reply) -> None:
        """A line of this length stands at the end; of two with one key (files put together) the first is taken."""
        if key not in self._places:
            self._places[key] = (self._end, length)
            self.calls += 1
            self.tokens += reply.prompt_tokens + reply.completion_tokens
        self._end += length


def _line(call: Call, reply: Reply) -> bytes:
    # Not the messages: a hundred thousand calls repeat their instructions, and whoever asks again can make them again.
    kept = {"key": call.key, "model": call.model, "version": call.version, "reply": asdict(reply)}
    return json.dumps(kept, ensure_ascii=False).encode() + b"\n"


def _record(line: bytes) -> tuple[str, Reply]:
    """Key and reply of a line. Raises ValueError, KeyError or TypeError for anything else."""
    read = json.loads(line)
    key, reply = read["key"], Reply(**read["reply"])
    if not (isinstance(key, str) and isinstance(reply.text, str)):
        raise TypeError("key and text must be text")
    if not (isinstance(reply.prompt_tokens, int) and isinstance(reply.completion_tokens, int)):
        raise TypeError("tokens must be whole numbers")
    return key, reply
