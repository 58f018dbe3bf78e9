"""Budget of a run, counted so that its limits hold for concurrent requests.

    max_calls     requests that are sent, including retries, repairs, and those of earlier runs
    max_tokens    tokens of prompts and replies

Before a request is sent, its maximum cost is reserved; when its reply arrives, the cost that the server reports
replaces the reservation. Unknown costs count as the maximum: an uncounted prompt is as many tokens as it has bytes (no
tokenizer in use makes more of a text in any language), a reply has as many as it was allowed, and a request whose
connection broke may have been billed in full.

An estimate (`prompt_tokens`, `text_tokens`) is not a bound, but the probable cost of a run.
"""

from __future__ import annotations

import asyncio
import json

from qllava.config import InputError
from qllava.llm.store import Call

CHARACTERS_PER_TOKEN = 4
"""Characters per token of English text in today's vocabularies, roughly; in other scripts each character is a token."""
IMAGE_TOKENS = 1000
"""Usual number of tokens of an image at a server, for an estimate."""
UNLIMITED_REPLY = 1024
"""Number of tokens of a reply without a limit, for an estimate."""

_TEMPLATE_TOKENS = 256  # tokens that a server's chat template may add: roles, dates, a system message


class Stopped(Exception):
    """Signal that no more requests are sent: the next one would exceed the budget, or the run is being ended."""


class Budget:
    """Counter of what is left of the limits, used by one event loop; `open` is the number of requests in flight."""

    def __init__(self, max_calls: int | None, max_tokens: int | None, requests: int, tokens: int) -> None:
        """Start from what earlier runs have spent.

        Args:
            max_calls: Maximum number of requests over all runs; None for any number.
            max_tokens: Maximum number of tokens over all runs; None for any number.
            requests: Number of requests of earlier runs.
            tokens: Number of tokens of earlier runs.
        """
        self.max_calls, self.max_tokens = max_calls, max_tokens
        self._requests, self._tokens = requests, tokens
        self.open = self._open_tokens = 0  # requests in flight, and their maximum cost
        self._more = 0  # number of tokens by which a server's count exceeded the bound, if it ever does
        self._settled = asyncio.Event()
        self._ended = False

    def end(self) -> None:
        """Refuse all further reservations."""
        self._ended = True
        self._settled.set()

    async def reserve(self, tokens: int) -> None:
        """Reserve the maximum cost of a request; if that is too much, wait for the real cost of others.

        Args:
            tokens: Maximum cost of the request, from `most_tokens`.

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
        """Replace the reservation of a request by its cost.

        Args:
            tokens: Number of tokens that was reserved.
            cost: Number of tokens that the request cost, or may have cost.
            sent: Whether the server received the request, or may have.
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
        # A server's surplus over the bound applies to the requests in flight too, which were sent before it was known.
        most = self._open_tokens + tokens + (self.open + 1) * self._more
        return self.max_tokens is None or self._tokens + most <= self.max_tokens


def reply_limit(call: Call) -> int | None:
    """Return the maximum number of tokens that a call allows for its reply; None if it sets no limit."""
    limits = [call.parameters.get(name) for name in ("max_completion_tokens", "max_tokens")]
    given = [limit for limit in limits if isinstance(limit, int) and not isinstance(limit, bool)]
    return max(given, default=None)


def check_bounded(call: Call) -> None:
    """Raise InputError for a call without a limit on its reply: no limit of tokens could be kept."""
    if reply_limit(call) is None:
        raise InputError(
            "--max-tokens-total needs a limit for the length of a reply; give max_tokens or "
            "max_completion_tokens in --parameters."
        )


def most_tokens(call: Call) -> int:
    """Return the maximum cost of a call in tokens: one per byte that is sent, the template, and the longest reply."""
    limit = reply_limit(call)
    return most_prompt_tokens(call) + (UNLIMITED_REPLY if limit is None else limit)


def most_prompt_tokens(call: Call) -> int:
    """Return the maximum number of tokens of a call's prompt, in any language and with any vocabulary."""
    sent = json.dumps([call.messages, dict(call.parameters)], ensure_ascii=False)
    return len(sent.encode(errors="replace")) + _TEMPLATE_TOKENS


def prompt_tokens(call: Call) -> int:
    """Estimate the number of tokens of a call's prompt."""
    contents = [message["content"] for message in call.messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    texts = [content for content in contents if isinstance(content, str)] + [part.get("text", "") for part in parts]
    images = len([part for part in parts if part["type"] == "image_url"])
    return text_tokens("".join(texts)) + IMAGE_TOKENS * images


def text_tokens(text: str) -> int:
    """Estimate the number of tokens of a text.

    >>> text_tokens("A dog runs."), text_tokens("\u4e00\u53ea\u72d7")
    (3, 3)
    """
    plain = len(text) if text.isascii() else sum(map(str.isascii, text))
    return -(-plain // CHARACTERS_PER_TOKEN) + len(text) - plain
