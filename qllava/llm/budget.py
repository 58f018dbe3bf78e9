"""What a run may spend, counted so that the limits hold whatever happens at the same time.

    max_calls     requests that are sent: those that are tried again, repairs, and those of earlier runs included
    max_tokens    tokens of prompts and replies

A request is sent only after the most that it can cost was taken from what is left; when its reply has come, what the
server says it cost takes that place. What is unknown counts at the most: a prompt that nobody has counted is as many
tokens as it has bytes (no tokenizer in use makes more of a text, whatever its language), a reply has as many as it was
allowed, and a request whose connection broke may have been paid in full.

An estimate (`prompt_tokens`, `text_tokens`) is not a bound: it says what a run will probably cost.
"""

from __future__ import annotations

import asyncio
import json

from qllava.config import InputError
from qllava.llm.store import Call

CHARACTERS_PER_TOKEN = 4
"""English text in today's vocabularies, roughly; of other scripts each character is taken for a token."""
IMAGE_TOKENS = 1000
"""What an image usually costs at a server, for an estimate."""
UNLIMITED_REPLY = 1024
"""Tokens that a reply without a limit is taken to have, for an estimate."""

_TEMPLATE_TOKENS = 256  # that a server's chat template may add of its own: roles, dates, a system's message


class Stopped(Exception):
    """Nothing more is asked: the next request would go over the budget, or the run is being ended."""


class Budget:
    """What is left of the limits; used by one event loop. `open`: how many requests are under way."""

    def __init__(self, max_calls: int | None, max_tokens: int | None, requests: int, tokens: int) -> None:
        """Begin with what earlier runs have spent.

        Args:
            max_calls: Most requests that may ever be sent; None for any number.
            max_tokens: Most tokens that may ever be spent; None for any number.
            requests: Requests that were sent before.
            tokens: Tokens that were spent before.
        """
        self.max_calls, self.max_tokens = max_calls, max_tokens
        self._requests, self._tokens = requests, tokens
        self.open = self._open_tokens = 0  # under way: how many, and the most that they can cost
        self._more = 0  # tokens by which a server has counted more than the bound, if one ever does
        self._settled = asyncio.Event()
        self._ended = False

    def end(self) -> None:
        """Let nobody reserve any more."""
        self._ended = True
        self._settled.set()

    async def reserve(self, tokens: int) -> None:
        """Take the most that a request can cost; where that is too much, wait for what others really cost.

        Args:
            tokens: The most that the request can cost, by `most_tokens`.

        Raises:
            Stopped: The request does not fit, or the run is being ended.
        """
        while not self._ended and not self._fits(tokens):
            if self.open == 0:
                raise Stopped
            self._settled.clear()
            await self._settled.wait()
        if self._ended:
            raise Stopped
        self.open += 1
        self._open_tokens += tokens

    def settle(self, tokens: int, cost: int, *, sent: bool) -> None:
        """Put what a request cost in the place of what was reserved for it.

        Args:
            tokens: What `reserve` was given.
            cost: Tokens that it cost, or may have cost.
            sent: Whether the server has got it, or may have.
        """
        self.open -= 1
        self._open_tokens -= tokens
        self._requests += sent
        self._tokens += cost
        self._more = max(self._more, cost - tokens)
        self._settled.set()

    def _fits(self, tokens: int) -> bool:
        if self.max_calls is not None and self._requests + self.open + 1 > self.max_calls:
            return False
        # What a reply has shown to be added counts for the requests under way too, which were sent before it was known.
        most = self._open_tokens + tokens + (self.open + 1) * self._more
        return self.max_tokens is None or self._tokens + most <= self.max_tokens


def reply_limit(call: Call) -> int | None:
    """The most tokens that a call allows for its reply; None where it sets no limit."""
    limits = [call.parameters.get(name) for name in ("max_completion_tokens", "max_tokens")]
    given = [limit for limit in limits if isinstance(limit, int) and not isinstance(limit, bool)]
    return max(given, default=None)


def check_bounded(call: Call) -> None:
    """Raise InputError for a call whose reply may have any length: no limit of tokens could be kept."""
    if reply_limit(call) is None:
        raise InputError(
            "--max-tokens-total needs a limit for the length of a reply; give max_tokens or "
            "max_completion_tokens in --parameters."
        )


def most_tokens(call: Call) -> int:
    """The most that a call can cost: a token for each byte that is sent, the template, and the longest reply."""
    limit = reply_limit(call)
    return most_prompt_tokens(call) + (UNLIMITED_REPLY if limit is None else limit)


def most_prompt_tokens(call: Call) -> int:
    """The most tokens that the prompt of a call can have, of any language and with any vocabulary."""
    sent = json.dumps([call.messages, dict(call.parameters)], ensure_ascii=False)
    return len(sent.encode(errors="replace")) + _TEMPLATE_TOKENS


def prompt_tokens(call: Call) -> int:
    """About how many tokens the prompt of a call has."""
    contents = [message["content"] for message in call.messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    texts = [content for content in contents if isinstance(content, str)] + [part.get("text", "") for part in parts]
    images = len([part for part in parts if part["type"] == "image_url"])
    return text_tokens("".join(texts)) + IMAGE_TOKENS * images


def text_tokens(text: str) -> int:
    """About how many tokens a text has.

    >>> text_tokens("A dog runs."), text_tokens("\u4e00\u53ea\u72d7")
    (3, 3)
    """
    plain = len(text) if text.isascii() else sum(map(str.isascii, text))
    return -(-plain // CHARACTERS_PER_TOKEN) + len(text) - plain
