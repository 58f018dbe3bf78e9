"""Tasks are asked of a server, many at a time, until each is settled, has failed, or the budget is spent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from qllava.llm.client import Client
from qllava.llm.refusals import Unanswered
from qllava.llm.store import Call
from qllava.synthesis.tasks import Asking, Form, Needed, Task, settle

_FORM_REFUSED = (400, 422)  # what servers answer to a field that they do not know


async def ask_all(
    tasks: Sequence[Task], asking: Asking, teacher: Client, on_end: Callable[[Task], object]
) -> dict[str, str]:
    """Ask; returns why tasks failed, by their ids. `on_end` gets each task that is done with, however it ended.

    Raises InputError where no call can succeed, and KeyboardInterrupt; what was answered until then is kept.
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
    """Finds out with its first call whether the server can be held to a JSON schema; the other calls wait for that."""

    def __init__(self, asking: Asking, teacher: Client) -> None:
        self.form: Form = asking.form or "schema"
        self._known = asking.form is not None
        self._asking, self._teacher = asking, teacher
        self._finding_out = asyncio.Lock()

    async def ask(self, task: Task, step: Needed) -> None:
        """Have a call answered and kept; or find out that it must be in another form, which `settle` then gives it."""
        # A call that repairs a reply has the form in which that was given.
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
            # It may have been something else that the server did not like. If so, this fails as well.
            await self._teacher.ask(self._asking.call(task, "blocks"))
            self.form = "blocks"
        self._known = True
