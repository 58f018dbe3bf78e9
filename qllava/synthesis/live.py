"""Requests to a server for many tasks at a time, until each is settled, has failed, or the budget is spent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from qllava.llm.client import Client
from qllava.llm.refusals import Unanswered
from qllava.llm.store import Call
from qllava.synthesis.tasks import Asking, Form, Needed, Task, settle

_FORM_REFUSED = (400, 422)  # status with which servers reject an unknown field


async def ask_all(
    tasks: Sequence[Task], asking: Asking, teacher: Client, on_end: Callable[[Task], object]
) -> dict[str, str]:
    """Request every reply that the tasks need.

    Args:
        tasks: Tasks that are not settled.
        asking: How the teacher is asked.
        teacher: Client of the server.
        on_end: Called with each task that has ended, whatever the outcome.

    Returns:
        Reasons of the tasks that failed, by task id.

    Raises:
        InputError: No call can succeed; replies received so far are kept.
        KeyboardInterrupt: The user stopped the run; replies received so far are kept.
    """
    failures: dict[str, str] = {}
    server = _Server(asking, teacher)

    async def work(task: Task) -> None:
        while isinstance(step := settle(task, asking, teacher.store.get, server.form), Needed):
            await server.ask(task, step)
        on_end(task)

    def failed(task: Task, reason: str) -> None:
        failures[task.id] = reason
        on_end(task)

    await teacher.each(tasks, work, failed)
    return failures


class _Server:
    """Server whose first call finds out whether it supports a JSON schema; the other calls wait for the result."""

    def __init__(self, asking: Asking, teacher: Client) -> None:
        self.form: Form = asking.form or "schema"
        self._known = asking.form is not None
        self._asking, self._teacher = asking, teacher
        self._finding_out = asyncio.Lock()

    async def ask(self, task: Task, step: Needed) -> None:
        """Get a reply and keep it, or find out that another form is needed, which `settle` then uses."""
        # A call that repairs a reply uses the form of that reply.
        if not self._known and not step.repair and "response_format" in step.call.parameters:
            async with self._finding_out:
                if not self._known:
                    await self._find_out(task, step.call)
                    return
            if self.form == "blocks":
                return
        await self._teacher.ask(step.call)

    async def _find_out(self, task: Task, call: Call) -> None:
        try:
            await self._teacher.ask(call)
        except Unanswered as error:
            if error.status not in _FORM_REFUSED:
                raise
            # The server may have rejected something else. If so, this call fails as well.
            await self._teacher.ask(self._asking.call(task, "blocks"))
            self.form = "blocks"
        self._known = True
