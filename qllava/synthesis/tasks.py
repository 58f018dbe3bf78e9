"""One example to be made, the calls that it needs, and its end: a pure function of the replies that are kept.

    settle(task, asking, known)
      -> Needed     a call that has no reply yet: the first one, or the one that repairs the first
      -> Settled    questions and answers that keep every rule; or the rule that the last reply broke

As nothing else decides, it does not matter in which order replies came, how often a run was stopped, or whether a
server answered or a batch file was read: asking only fills the store.
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
"""The replies that are kept, by the key of their call."""
Form: TypeAlias = Literal["schema", "blocks"]

PARAMETERS: Mapping[str, Any] = {"temperature": 0.7, "max_tokens": 1024}


@dataclass(frozen=True)
class Task:
    """One example to be made."""

    context: Context
    type: str
    style: str | None = None

    @property
    def id(self) -> str:
        """Of the example: "000000296284-detail"."""
        return f"{self.context.id}-{self.type}"


@dataclass(frozen=True)
class Needed:
    """What must be asked next."""

    call: Call
    repair: bool  # whether it asks to write a reply again


@dataclass(frozen=True)
class Settled:
    """The end of a task."""

    turns: Turns  # empty when it is dropped
    reason: str | None = None  # the rule that the last reply breaks; None when there is an example
    first: str | None = None  # the rule that the first reply breaks
    said: str = ""  # the last reply of a task that is dropped


@dataclass(frozen=True)
class Asking:
    """How a teacher is asked.

    form: of the replies; None for JSON where the server can be held to a schema, and blocks elsewhere.
    """

    model: str
    prompts: Prompts
    parameters: Mapping[str, Any] = field(default_factory=lambda: dict(PARAMETERS))
    form: Form | None = None
    _read: dict[tuple[str, str | None], Prompt] = field(default_factory=dict, init=False, repr=False)

    def prompt(self, task: Task) -> Prompt:
        """The prompt of a task; its files are read once."""
        name = (task.type, task.style)
        if name not in self._read:
            self._read[name] = self.prompts.prompt(*name)
        return self._read[name]

    def call(self, task: Task, form: Form) -> Call:
        """The first call of a task; a description is a text in either form."""
        prompt = self.prompt(task)
        schema = form == "schema" and prompt.turns is not None
        parameters = {**self.parameters, **({"response_format": RESPONSE_FORMAT} if schema else {})}
        return Call(self.model, prompt.messages(task.context, schema=schema), parameters, prompt.version)

    def first(self, task: Task, known: Known, form: Form) -> Call:
        """The first call of a task: where the form is open, the one that has a reply, else the one in `form`."""
        forms: tuple[Form, ...] = ("schema", "blocks") if self.form is None else (self.form,)
        calls = {each: self.call(task, each) for each in forms}
        return next((call for call in calls.values() if known(call.key) is not None), calls[self.form or form])


def make_tasks(contexts: Sequence[Context], types: Sequence[str], styles: Sequence[str] = ()) -> list[Task]:
    """Every image with every type; of several styles an image gets one, by its id."""
    return [
        Task(context, type_, styles[draw(f"style {context.id}", len(styles))] if styles else None)
        for context in contexts
        for type_ in types
    ]


def of_shard(contexts: Sequence[Context], number: int, count: int) -> list[Context]:
    """The images of shard `number` (from 1) of `count`, by their ids: the same on every machine."""
    return [context for context in contexts if draw(f"shard {context.id}", count) == number - 1]


def settle(task: Task, asking: Asking, known: Known, form: Form = "schema") -> Needed | Settled:
    """The call that a task needs next, or its end; `form` is of a first reply that is still to be asked for."""
    if task.type == "naive":  # a question of a list, and a caption: nobody is asked
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
    # A turn that says nothing is refused by some servers.
    said = (
        {"role": "assistant", "content": answer_of(reply.text) or "(nothing)"},
        {"role": "user", "content": request},
    )
    return Call(call.model, (*call.messages, *said), call.parameters, call.version)
