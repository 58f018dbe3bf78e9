"""Retries of one call and the pauses between them, with tenacity's loop, counts and doubled pauses.

Three things are ours, because tenacity lacks them:

- A pause that applies to all calls: a server that sends `Retry-After` for one of them means the others too
  (`Client._attempts` waits for it before each attempt).
- An attempt that does not count: 429 is not a failure of this call while the server answers other calls.
- Jitter that never makes a pause shorter and grows with it: the doubled pauses together are the outage that a call
  survives. tenacity's `wait_random_exponential` starts at 0, and the jitter of `wait_exponential_jitter` does not grow.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from qllava.llm.refusals import Standing, Trouble, Unanswered
from qllava.llm.store import Reply

if TYPE_CHECKING:
    from tenacity import RetryCallState

_LONGEST_REST = 60.0  # maximum seconds between two attempts, unless the server sets them


class Patience:
    """The attempts of one call."""

    def __init__(self, standing: Standing, retries: int, first_rest: float) -> None:
        """Start counting.

        Args:
            standing: State of the server, with the number of calls it has answered.
            retries: Number of attempts after the first.
            first_rest: Minimum seconds before the second attempt; twice as many before each further one.
        """
        from tenacity import wait_exponential  # here: a command that asks no server does not pay for the import

        self._standing, self._retries = standing, retries
        self._failures, self._answered = 0, standing.answered
        self._doubled = wait_exponential(multiplier=first_rest, max=_LONGEST_REST)

    async def wait_for(
        self, attempt: Callable[[], Awaitable[Reply | Trouble]], rest: Callable[[float], Awaitable[None]]
    ) -> Reply:
        """Attempt until there is a reply.

        Args:
            attempt: Function for one attempt; an exception ends the call.
            rest: Function that waits a number of seconds; an exception ends the call.

        Raises:
            Unanswered: All attempts failed with temporary errors.
        """
        from tenacity import AsyncRetrying, retry_if_result

        retrying = AsyncRetrying(
            retry=retry_if_result(lambda found: isinstance(found, Trouble)),
            stop=self._is_at_its_end,
            wait=self._pause,
            sleep=rest,
            retry_error_callback=_give_up,
        )
        reply: Reply = await retrying(attempt)
        return reply

    def _is_at_its_end(self, state: RetryCallState) -> bool:
        """Count the attempt, unless the server was only busy with other calls."""
        busy = _trouble(state).status == 429 and self._standing.answered > self._answered
        self._failures += not busy
        self._answered = self._standing.answered
        return self._failures > self._retries

    def _pause(self, state: RetryCallState) -> float:
        """Return the seconds before the next attempt; 0 if the server set a time, which every attempt waits for."""
        return 0.0 if _trouble(state).wait else self._doubled(state) * random.uniform(1.0, 1.5)


def _give_up(state: RetryCallState) -> Any:
    last = _trouble(state)
    reason = f"{state.attempt_number} attempts failed, the last one with {last.reason}"
    raise Unanswered(reason, last.status, outage=True)


def _trouble(state: RetryCallState) -> Trouble:
    assert state.outcome is not None
    found: Trouble = state.outcome.result()
    return found
