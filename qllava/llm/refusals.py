"""What it means that a request had no reply: for this request, for the next attempt, and for the run.

    passes          nobody answers, the connection breaks, 408, 409, 425, 429, 5xx: tried again, more and more slowly
    is refused      400, 403, 404, 413, 422, ...: this request has no reply, others may; it is not tried again
    ends the run    401, 402, no credit, a pause of more than a quarter of an hour: every other request would fail alike

A server that is away, and one that refuses everything, end a run too, which is known from several requests only:
requests that failed in a row after all their attempts, or refusals in a row without any reply.
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
_OF_THE_ADDRESS = {403, 404, 405, *range(300, 400)}  # of one request, or of all: the next ones tell
_LONGEST_WAIT = 900.0  # seconds; a server that wants a longer pause has a quota of the day
_HOPELESS = 20  # calls in a row without a reply after all their attempts: the server is away
_NEVER = 20  # refusals by the address before any reply: all others would be refused, too
_REFUSED_IN_A_ROW = 1000  # other refusals in a row: the parameters do not suit the model


class Unanswered(Exception):
    """One call has no reply; `status` is the server's last one, None without any."""

    def __init__(self, reason: str, status: int | None = None, *, outage: bool = False) -> None:
        """Say why, and whether the server is away (`outage`) rather than against this request."""
        super().__init__(reason)
        self.status = status
        self.outage = outage


@dataclass(frozen=True)
class Trouble:
    """An attempt without a reply."""

    reason: str
    """In words, without a secret."""
    status: int | None = None
    """The server's; None where it did not answer."""
    wait: float | None = None
    """Seconds after which the server wants the next request; None where it does not say."""
    passes: bool = True
    """Whether another attempt may succeed."""


def trouble_of(response: httpx.Response, address: Address) -> Trouble:
    """Return what an answer other than a reply means.

    Raises:
        InputError: Every other request would fail alike.
    """
    status, said = _said(response, address)
    reason = f"status {status}: {said}"
    wait = _retry_after(response.headers.get("retry-after"))
    if status == 401:
        raise InputError(_wants_key(reason, address))
    if status == 402 or (status == 429 and b"insufficient_quota" in response.content):
        raise InputError(f"{address.url}: the account has no credit left ({reason}); add to it and start again.")
    if wait is not None and wait > _LONGEST_WAIT:
        raise InputError(
            f"{address.url} accepts no request for {wait / 60:,.0f} minutes ({reason}); run the command again after "
            "that."
        )
    return Trouble(reason, status, wait, passes=status in _PASSING or status == 200)


class Standing:
    """What the answers so far say about the server: whether it is there, and whether it takes requests at all."""

    def __init__(self, address: Address) -> None:
        """Begin without knowing anything."""
        self.answered = 0
        self.heard = False  # whether there was an answer of any kind
        self._address = address
        self._away = self._refused = self._barred = 0  # in a row, since the last reply
        self._last = ""

    def reply(self) -> None:
        """Note a reply."""
        self.answered += 1
        self._away = self._refused = self._barred = 0

    def failure(self, error: Unanswered, *, before: bool) -> None:
        """Note a call without a reply; `before`: so it was in an earlier run, and says nothing about others.

        Raises:
            InputError: The server is away, or refuses everything.
        """
        if error.outage:
            self._away += 1
            if self._away >= _HOPELESS:
                raise InputError(
                    f"{self._away} calls in a row had no reply; the last error: {error}. Fix the cause and run the "
                    "command again; replies so far are kept."
                ) from error
            return
        if error.status is not None:  # the server is there
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
                "the model's name, and start again; what was answered is kept."
            ) from error

    def at_the_end(self) -> None:
        """Raise InputError when every request was refused by the address, few as they were."""
        if self._barred and not self.answered:
            raise InputError(self._last)

    def _nowhere(self, reason: str) -> str:
        return (
            f"{self._address.url} has no such address or no such model ({reason}); correct --base-url, which mostly "
            "ends with /v1, or the model's name."
        )


def no_server(address: Address, reason: str) -> InputError:
    """What to say where nobody has ever answered."""
    return InputError(f"No server answers at {address.url} ({reason}); start the server or correct --base-url.")


def _wants_key(reason: str, address: Address) -> str:
    if address.login:
        return f"{address.url} does not accept the user and password of --base-url ({reason}); correct them."
    key = "the key in OPENAI_API_KEY is not accepted" if address.key else "OPENAI_API_KEY is not set"
    return f"{address.url} wants another key ({reason}): {key}; set it to a valid one."


def _said(response: httpx.Response, address: Address) -> tuple[int, str]:
    """Status and words of a server, in one short line that holds no secret; an error may come with status 200."""
    status, said = response.status_code, response.text
    read = read_json(response.content)
    if status == 200 and (error := error_of(read)) is not None:
        status, said = error["status"] or status, error["message"]
    elif isinstance(read, dict):
        error = read.get("error", read)
        said = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    return status, " ".join(address.hidden(whole(said)).split())[:300] or "no reason given"


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait by the header Retry-After, a number or a date; None where there is none that can be read."""
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
