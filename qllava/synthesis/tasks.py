"""Tasks: one example to be made, the calls that it needs, and its end, as a pure function of the stored replies.

    settle(task, asking, known)
      -> Needed     a call that has no reply yet: the first one, or the one that repairs the first
      -> Settled    questions and answers that keep every rule; or the rule that the last reply broke

The result depends on nothing else. So the order of the replies, the number of times that a run was stopped, and whether
the replies came from a server or a batch file have no influence: a request only adds to the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from qllava.data.contexts import Context
from qllava.llm.store import Call, Reply
from qllava.llm.thoughts import answer_of
from qllava.synthesis.prompting import Prompt, Prompts, draw
from qllava.synthesis.replies import RESPONSE_FORMAT, Turns, judge, repair_request

Known: TypeAlias = Callable[[str], Reply | None]
"""Function that returns the stored reply of a call, given the key of the call; None if there is none."""
Form: TypeAlias = Literal["schema", "blocks"]

PARAMETERS: Mapping[str, Any] = {"temperature": 0.7, "max_tokens": 1024}


@dataclass(frozen=True)
class Task:
    """One example to be made."""

    context: Context
    """Captions and boxes of the image."""
    type: str
    """Response type, such as "detail"."""
    style: str | None = None
    """Style of instruction; None for the plain prompt."""

    @property
    def id(self) -> str:
        """Id of the example, such as "000000296284-detail"."""
        return f"{self.context.id}-{self.type}"


@dataclass(frozen=True)
class Needed:
    """Next call of a task."""

    call: Call
    """Call that has no reply yet."""
    repair: bool
    """Whether the call asks the teacher to write a reply again."""


@dataclass(frozen=True)
class Settled:
    """End of a task."""

    turns: Turns
    """Questions and answers; empty if the task is dropped."""
    reason: str | None = None
    """Rule that the last reply breaks; None if there is an example."""
    first: str | None = None
    """Rule that the first reply breaks, if any."""
    said: str = ""
    """Last reply of a task that is dropped."""


@dataclass(frozen=True)
class Asking:
    """Settings of the requests to a teacher."""

    model: str
    """Name of the model on the server."""
    prompts: Prompts
    """Prompts of the run."""
    parameters: Mapping[str, Any] = field(default_factory=lambda: dict(PARAMETERS))
    """Parameters of every call, such as the temperature."""
    form: Form | None = None
    """Form of the replies; None for JSON if the server supports a schema, and blocks otherwise."""
    _read: dict[tuple[str, str | None], Prompt] = field(default_factory=dict, init=False, repr=False)
    """Prompts that were read already, by type and style."""

    def prompt(self, task: Task) -> Prompt:
        """Return the prompt of a task; its files are read once."""
        name = (task.type, task.style)
        if name not in self._read:
            self._read[name] = self.prompts.prompt(*name)
        return self._read[name]

    def call(self, task: Task, form: Form) -> Call:
        """Return the first call of a task; a description is plain text in either form."""
        prompt = self.prompt(task)
        schema = form == "schema" and prompt.turns is not None
        parameters = {**self.parameters, **({"response_format": RESPONSE_FORMAT} if schema else {})}
        return Call(self.model, prompt.messages(task.context, schema=schema), parameters, prompt.version)

    def first(self, task: Task, known: Known, form: Form) -> Call:
        """Return the first call of a task; if no form is set, the call that has a reply, else the one in `form`."""
        forms: tuple[Form, ...] = ("schema", "blocks") if self.form is None else (self.form,)
        calls = {each: self.call(task, each) for each in forms}
        return next((call for call in calls.values() if known(call.key) is not None), calls[self.form or form])


def make_tasks(contexts: Sequence[Context], types: Sequence[str], styles: Sequence[str] = ()) -> list[Task]:
    """Return a task for every image and type; if there are several styles, each image gets one, by its id."""
    return [
        Task(context, type_, styles[draw(f"style {context.id}", len(styles))] if styles else None)
        for context in contexts
        for type_ in types
    ]


def of_shard(contexts: Sequence[Context], number: int, count: int) -> list[Context]:
    """Return the contexts of shard `number` (from 1) of `count`; the choice by id is the same on every machine."""
    return [context for context in contexts if draw(f"shard {context.id}", count) == number - 1]


def settle(task: Task, asking: Asking, known: Known, form: Form = "schema") -> Needed | Settled:
    """Return the call that a task needs next, or its end.

    Args:
        task: The task.
        asking: Settings of the requests.
        known: Finds stored replies.
        form: Form of a first reply that has not been requested yet.
    """
    if task.type == "naive":  # a question of a list and a caption need no teacher
        captions = task.context.captions
        answer = captions[draw(f"caption {task.context.id}", len(captions))]
        return Settled(((asking.prompts.question("naive", task.context), answer),))
    call = asking.first(task, known, form)
    reply = known(call.key)
    if reply is None:
        return Needed(call, repair=False)
    verdict = judge(reply, asking.prompt(task).turns, task.context)
    first = verdict.reason
    if verdict.broken and first != "refused":
        call = _again(call, reply, repair_request(verdict.broken))
        reply = known(call.key)
        if reply is None:
            return Needed(call, repair=True)
        verdict = judge(reply, asking.prompt(task).turns, task.context)
    if verdict.broken:
        return Settled((), verdict.reason, first, reply.text)
    question, answer = verdict.turns[0]
    question = question or asking.prompts.question(task.type, task.context)
    return Settled(((question, answer), *verdict.turns[1:]), None, first)


def _again(call: Call, reply: Reply, request: str) -> Call:
    # Some servers reject an empty turn.
    said = (
        {"role": "assistant", "content": answer_of(reply.text) or "(nothing)"},
        {"role": "user", "content": request},
    )
    return Call(call.model, (*call.messages, *said), call.parameters, call.version)
