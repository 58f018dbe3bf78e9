"""Requests to a judge: a language model behind an OpenAI-compatible server.

Replies are stored by the content of the call (`llm.store`), so that an evaluation that is repeated or was interrupted
requests only missing replies.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qllava.config import InputError, cache_folder
from qllava.files import write_whole
from qllava.llm.address import OPENAI, chosen, without_secrets
from qllava.llm.client import Client
from qllava.llm.store import Call, Message, Reply, Store
from qllava.llm.thoughts import answer_of

CONCURRENCY = 8
PARAMETERS: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 1024}


@dataclass(frozen=True)
class Judge:
    """A judge, with its server and the store of its replies."""

    name: str
    """Name of the model on the server."""
    base_url: str | None = field(default=None, repr=False)
    """Address of the server, may contain a password; None for OPENAI_BASE_URL, or else OpenAI's address."""
    store: Path | None = None
    """File of the replies; None for one file in the cache folder that all evaluations share."""
    parameters: Mapping[str, Any] = field(default_factory=lambda: PARAMETERS)
    """Parameters of every call."""

    def call(self, prompt: str, text: str, images: Sequence[str] = ()) -> Call:
        """Return a call to the judge.

        Args:
            prompt: System message; its hash is part of the version of the call.
            text: Case to judge, the user message.
            images: Images as data URIs, for a judge that accepts images.
        """
        content: Any = text
        if images:
            content = [{"type": "text", "text": text}]
            content += [{"type": "image_url", "image_url": {"url": image}} for image in images]
        messages: tuple[Message, ...] = ({"role": "system", "content": prompt}, {"role": "user", "content": content})
        version = f"judge-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}{self._place()}"
        return Call(self.name, messages, self.parameters, version)

    def _place(self) -> str:
        """Return a mark of the server for the version of a call; empty for OpenAI's address.

        A name may mean different models at different addresses: many local servers use one name for all models.
        """
        address = chosen(self.base_url)
        return "" if address == OPENAI else f"-{hashlib.sha256(without_secrets(address).encode()).hexdigest()[:8]}"

    def ask(self, calls: Sequence[Call]) -> Answered:
        """Return the replies in the order of the calls.

        Raises:
            InputError: No call can succeed, or the store cannot be created.
        """
        if not calls:
            return Answered(self, (), (), 0)
        path = self.store or cache_folder() / "judge" / "calls.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path.parent} cannot be created ({error.strerror}); choose another --store.") from error
        with Store(path) as store:
            return asyncio.run(self._ask(calls, store))

    async def _ask(self, calls: Sequence[Call], store: Store) -> Answered:
        replies: list[Reply | None] = [None] * len(calls)
        asked = 0
        with tqdm(total=len(calls), desc="judge", unit="reply", disable=None) as bar:
            async with Client(store, self.base_url, concurrency=CONCURRENCY) as client:
                before = store.calls
                # Calls that failed before come last, so that they cannot block the others.
                turn = sorted(range(len(calls)), key=lambda index: store.failures(calls[index].key))

                async def work(index: int) -> None:
                    replies[index] = await client.ask(calls[index])
                    bar.update()

                def failed(index: int, reason: str) -> None:
                    # Not to stdout, which is for the result and must not contain text of a server.
                    bar.write(f"No reply from the judge to call {index + 1} of {len(calls)}: {reason}", file=sys.stderr)
                    bar.update()

                await client.each(turn, work, failed)
                asked = store.calls - before
        return Answered(self, tuple(calls), tuple(replies), asked)


@dataclass(frozen=True)
class Answered:
    """Replies of a judge, with their cost."""

    judge: Judge
    """Judge that was asked."""
    calls: tuple[Call, ...]
    """Calls to the judge."""
    replies: tuple[Reply | None, ...]
    """Reply to each call; None if every attempt failed."""
    asked: int
    """Number of new replies, those from the store not included."""

    def texts(self) -> list[str | None]:
        """Return the text of each reply, without thinking blocks; None for a missing, refused or unreadable reply."""
        return [
            None
            if reply is None or reply.refusal is not None or reply.finish_reason == "unreadable"
            else answer_of(reply.text)
            for reply in self.replies
        ]

    def to_json(self) -> dict[str, Any]:
        """Return name, parameters and cost of the judge; a call that occurs twice is counted once."""
        replies = {call.key: reply for call, reply in zip(self.calls, self.replies, strict=True)}
        there = [reply for reply in replies.values() if reply is not None]
        return {
            "name": self.judge.name,
            "base_url": None if self.judge.base_url is None else without_secrets(self.judge.base_url),
            "parameters": dict(self.judge.parameters),
            "calls": len(replies),
            "asked_now": self.asked,
            "prompt_tokens": sum(reply.prompt_tokens for reply in there),
            "completion_tokens": sum(reply.completion_tokens for reply in there),
        }


def json_object(text: str, keys: set[str]) -> dict[str, Any] | None:
    """Return the only JSON object with these keys in a reply, which may have other text; None for none or several."""
    decoder = json.JSONDecoder()
    found, at = [], text.find("{")
    while at >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
        else:
            if keys <= value.keys():
                found.append(value)
        at = text.find("{", at)
    return found[0] if len(found) == 1 else None


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines completely or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another path.") from error
