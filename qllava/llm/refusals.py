"""Classification of requests without a reply: what it means for this request, the next attempt, and the run.

    temporary       no server, a broken connection, 408, 409, 425, 429, 5xx: tried again, with growing pauses
    refused         400, 403, 404, 413, 422, ...: this request has no reply, others may; it is not tried again
    ends the run    401, 402, no credit, a pause of more than a quarter of an hour: every other request would fail too

A server that is unreachable, or that refuses everything, ends a run too. Only several requests show that: requests that
failed in a row after all their attempts, or refusals in a row without any reply.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

from qllava.config import InputError
from qllava.llm.address import Address
from qllava.llm.completions import error_of, read_json, whole

_PASSING = {408, 409, 425, 429, *range(500, 600)}
_OF_THE_ADDRESS = {403, 404, 405, *range(300, 400)}  # about one request, or all: the next requests show which
_LONGEST_WAIT = 900.0  # seconds; a server that asks for a longer pause has a daily quota
_HOPELESS = 20  # calls in a row without a reply after all their attempts: the server is unreachable
_NEVER = 20  # refusals by the address before any reply: all others would be refused too
_REFUSED_IN_A_ROW = 1000  # other refusals in a row: the parameters do not fit the model


class Unanswered(Exception):
    """Error of one call without a reply; `status` is the server's last one, or None."""

    def __init__(self, reason: str, status: int | None = None, *, outage: bool = False) -> None:
        """Store the reason, and whether the server is unreachable (`outage`) instead of refusing this request."""
        super().__init__(reason)
        self.status = status
        self.outage = outage


@dataclass(frozen=True)
class Trouble:
    """Reason why an attempt had no reply."""

    reason: str
    """Description without secrets."""
    status: int | None = None
    """Status code; None if the server did not answer."""
    wait: float | None = None
    """Seconds until the server accepts the next request; None if it does not say."""
    passes: bool = True
    """Whether another attempt may succeed."""


def trouble_of(response: httpx.Response, address: Address) -> Trouble:
    """Classify a response that is not a reply.

    Raises:
        InputError: Every other request would fail in the same way.
    """
    status, said = _said(response, address)
    reason = f"status {status}: {said}"
    wait = _retry_after(response.headers.get("retry-after"))
    if status == 401:
        raise InputError(_wants_key(reason, address))
    if status == 402 or (status == 429 and b"insufficient_quota" in response.content):
        raise InputError(
            f"{address.url}: the account has no credit left ({reason}). Add credit and run the command again."
        )
    if wait is not None and wait > _LONGEST_WAIT:
        raise InputError(
            f"{address.url} accepts no request for {wait / 60:,.0f} minutes ({reason}); run the command again after "
            "that."
        )
    return Trouble(reason, status, wait, passes=status in _PASSING or status == 200)


class Standing:
    """State of the server by its answers so far: whether it is reachable, and whether it accepts requests at all."""

    def __init__(self, address: Address) -> None:
        """Start without any answers."""
        self.answered = 0
        self.heard = False  # whether there was a response of any kind
        self._address = address
        self._away = self._refused = self._barred = 0  # in a row, since the last reply
        self._last = ""

    def reply(self) -> None:
        """Count a reply."""
        self.answered += 1
        self._away = self._refused = self._barred = 0

    def failure(self, error: Unanswered, *, before: bool) -> None:
        """Count a call without a reply.

        Args:
            error: Reason of the failure.
            before: Whether the call failed in an earlier run too; then it tells nothing about other calls.

        Raises:
            InputError: The server is unreachable, or refuses everything.
        """
        if error.outage:
            self._away += 1
            if self._away >= _HOPELESS:
                raise InputError(
                    f"{self._away} calls in a row had no reply; the last error: {error}. Fix the cause and run the "
                    "command again; replies so far are kept."
                ) from error
            return
        if error.status is not None:  # the server is reachable
            self._away = 0
        self._refused += not before
        if error.status in _OF_THE_ADDRESS and not before:
            self._barred += 1
            self._last = _wants_key(str(error), self._address) if error.status == 403 else self._nowhere(str(error))
            if self._barred >= _NEVER and not self.answered:
                raise InputError(self._last) from error
        if self._refused >= _REFUSED_IN_A_ROW:
            raise InputError(
                f"{self._refused:,} requests in a row were refused, the last one with {error}. Correct --parameters or "
                "the model's name, and run the command again; replies so far are kept."
            ) from error

    def at_the_end(self) -> None:
        """Raise InputError if every request was refused by the address, even if there were few."""
        if self._barred and not self.answered:
            raise InputError(self._last)

    def _nowhere(self, reason: str) -> str:
        return (
            f"{self._address.url} has no such address or no such model ({reason}); correct --base-url, which usually "
            "ends with /v1, or the model's name."
        )


def no_server(address: Address, reason: str) -> InputError:
    """Return the error for an address where no server has ever answered."""
    return InputError(f"No server answers at {address.url} ({reason}); start the server or correct --base-url.")


def _wants_key(reason: str, address: Address) -> str:
    if address.login:
        return f"{address.url} does not accept the user and password of --base-url ({reason}); correct them."
    key = "the key in OPENAI_API_KEY is not accepted" if address.key else "OPENAI_API_KEY is not set"
    return f"{address.url} requires another key ({reason}): {key}; set it to a valid one."


def _said(response: httpx.Response, address: Address) -> tuple[int, str]:
    """Return a server's status and message as one short line without secrets; an error may come with status 200."""
    status, said = response.status_code, response.text
    read = read_json(response.content)
    if status == 200 and (error := error_of(read)) is not None:
        status, said = error["status"] or status, error["message"]
    elif isinstance(read, dict):
        error = read.get("error", read)
        said = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    return status, " ".join(address.hidden(whole(said)).split())[:300] or "no reason given"


def _retry_after(value: str | None) -> float | None:
    """Return the seconds to wait by the header Retry-After, a number or a date; None if it is missing or invalid."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, LookupError, OverflowError):
        return None
