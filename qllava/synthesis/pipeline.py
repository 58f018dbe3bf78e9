"""Pipeline of `qllava synthesize`: estimate the costs, ask the teacher (or exchange batch files), write the output.

    tasks = make_tasks(read_contexts(path), DEFAULT_TYPES)
    job = Job(tasks, Asking("a-model", Prompts()), Path("out.json"), Path("out.calls.jsonl"))
    result = run(job, "http://127.0.0.1:8000/v1", concurrency=64)

Replies go into the store; the output is then written from the store alone (see `tasks`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qllava.config import InputError
from qllava.conversation import IMAGE_TOKEN
from qllava.llm.batch import Exported, Imported, read_results, write_requests
from qllava.llm.budget import check_bounded, most_prompt_tokens, most_tokens, prompt_tokens, text_tokens
from qllava.llm.client import RETRIES, Client, fault
from qllava.llm.store import Call, Reply, Store
from qllava.synthesis.live import ask_all
from qllava.synthesis.output import Counts, write_output
from qllava.synthesis.prompting import example_turns
from qllava.synthesis.rules import examples as rules
from qllava.synthesis.tasks import Asking, Form, Known, Needed, Settled, Task, settle

TOO_LITTLE = "too little known"
"""Reason for tasks that the rules leave out: the annotation allows no question."""

_FORMS: tuple[Form, ...] = ("schema", "blocks")
_REPAIR_TOKENS = 1000  # upper bound of the tokens of a repair request: the sentences of all rules
_PLAIN_REPLY = 300  # estimated tokens of a reply if a user's prompt has no worked example


@dataclass(frozen=True)
class Job:
    """Tasks of a run, with the settings of the requests and the files of the run."""

    tasks: Sequence[Task]
    """Examples to be made."""
    asking: Asking
    """Settings of the requests."""
    out: Path
    """File of the examples."""
    store: Path
    """File of the replies."""


@dataclass(frozen=True)
class Result:
    """Result of a job."""

    counts: Counts
    """Counts of the outcomes."""
    calls: int
    """Number of new replies in the store."""
    tokens: int
    """Tokens of the new replies, prompts included."""
    calls_kept: int
    """Number of all replies in the store."""
    tokens_kept: int
    """Tokens of all replies in the store, prompts included."""
    seconds: float
    """Duration of the job in seconds."""
    failures: Mapping[str, str]
    """Reasons of the tasks that failed, by task id."""
    imported: Imported | None = None
    """Counts of an imported batch; None without one."""

    def to_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            **self.counts.to_json(),
            "calls": self.calls,
            "tokens": self.tokens,
            "calls_kept": self.calls_kept,
            "tokens_kept": self.tokens_kept,
            "seconds": round(self.seconds, 1),
            **({"imported": asdict(self.imported)} if self.imported else {}),
        }


def run(job: Job, base_url: str | None = None, **limits: Any) -> Result:
    """Request the replies that are missing in the store, and write the output.

    Args:
        job: Tasks, settings and files.
        base_url: Address of the server.
        **limits: Limits of `Client`, such as the concurrency and the budget.

    Raises:
        InputError: No call can succeed; replies received so far are kept, and the output is unchanged.
        KeyboardInterrupt: The user stopped the run; replies received so far are kept, and the output is unchanged.
    """
    started = time.monotonic()
    with Store(job.store) as store:
        before = store.calls, store.tokens
        open_tasks = _in_turn(job, _kept_in(store))

        async def ask() -> dict[str, str]:
            with tqdm(
                total=len(job.tasks), initial=len(job.tasks) - len(open_tasks), unit="example", disable=None
            ) as bar:
                async with Client(store, base_url, **limits) as teacher:
                    return await ask_all(open_tasks, job.asking, teacher, lambda _: bar.update())

        failures = asyncio.run(ask()) if open_tasks else {}  # without open tasks no server is needed
        return _written(job, store, before, started, failures)


def run_rules(tasks: Sequence[Task], out: Path, *, seed: int = 0, brief: bool = False) -> Counts:
    """Write the examples that the rules derive; a task for which too little is known is dropped."""

    def end_of(task: Task) -> Settled:
        records = rules.write(task.context, (task.type,), seed=seed, brief=brief)
        if not records:
            return Settled((), TOO_LITTLE)
        said = [turn["value"] for turn in records[0]["conversations"]]
        said[0] = said[0].replace(IMAGE_TOKEN, "").strip()
        return Settled(tuple(zip(said[::2], said[1::2], strict=True)))

    return write_output(out, tqdm(tasks, unit="example", disable=None), end_of, {})


def import_batch(job: Job, results: Sequence[Path]) -> Result:
    """Store the replies of a batch, from one or several files, and write the output of the settled tasks."""
    started = time.monotonic()
    with Store(job.store) as store:
        before = store.calls, store.tokens
        imported = read_results(results, _wanted(job, store), store)
        return _written(job, store, before, started, {}, imported)


def _wanted(job: Job, store: Store) -> Callable[[str], Call | None]:
    """Return a function that finds a call that the job needs next by its key; only keys are held in memory."""
    found: set[str] = set()

    def known(key: str) -> Reply | None:  # the store as it was before the import, without the replies added since
        return None if key in found else store.get(key)

    numbers: dict[bytes, int] = {}
    for at, form in enumerate(_FORMS):
        for number, task in enumerate(job.tasks):
            if (step := _next(task, job.asking, known, form)) is not None:
                numbers[bytes.fromhex(step.call.key)] = len(_FORMS) * number + at

    def call_of(key: str) -> Call | None:
        try:
            number, at = divmod(numbers[bytes.fromhex(key)], len(_FORMS))
        except (KeyError, ValueError):  # a key of another command, or not a key
            return None
        step = _next(job.tasks[number], job.asking, known, _FORMS[at])
        if step is None:
            return None
        found.add(step.call.key)  # the same string object that the store keeps
        return step.call

    return call_of


def export_batch(job: Job, requests: Path, max_calls: int | None = None, max_tokens: int | None = None) -> Exported:
    """Write the calls that are needed next, as many as the budget allows; calls that failed before come last.

    Raises:
        InputError: A file cannot be written, or there is a limit of tokens but no limit of a reply's length.
    """
    with _kept(job.store) as kept:

        def affordable() -> Iterator[Call]:
            calls, tokens = kept.requests, kept.tokens
            # If nothing has failed, the order does not change, and `_next` below skips settled tasks.
            for task in _in_turn(job, kept) if kept.failed else job.tasks:
                step = _next(task, job.asking, kept.known)
                if step is None:
                    continue
                if max_tokens is not None:
                    check_bounded(step.call)
                calls, tokens = calls + 1, tokens + most_tokens(step.call)
                if (max_calls is not None and calls > max_calls) or (max_tokens is not None and tokens > max_tokens):
                    return
                yield step.call

        return write_requests(requests, affordable())


def estimate(job: Job, retries: int = RETRIES) -> dict[str, int]:
    """Return the remaining calls and tokens: an estimate, and an upper bound.

    The estimate counts a token for four Latin characters or one character of another script, takes a reply to be as
    long as the worked examples of its type, and assumes no repairs. The upper bound counts a token for each byte of a
    prompt, and assumes that every reply has the maximum length and is repaired once, which costs the prompt, the reply
    and another reply, and that each request is retried as often as allowed.
    """
    calls = prompt = completion = most_calls = most = 0
    with _kept(job.store) as kept:
        for task, step in needed(job, kept.known):
            calls += 1
            prompt += prompt_tokens(step.call)
            completion += _usual_reply(job.asking, task)
            most_calls += 1 if step.repair else 2
            once = most_tokens(step.call)
            longest = once - most_prompt_tokens(step.call)
            most += once + (0 if step.repair else once + longest + _REPAIR_TOKENS)
    return {
        "tasks": len(job.tasks),
        "calls": calls,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "calls_at_most": most_calls,
        "tokens_at_most": most,
        "requests_at_most": most_calls * (1 + retries),
        "requests_so_far": kept.requests,
        "tokens_so_far": kept.tokens,
    }


def needed(job: Job, known: Known, form: Form = "schema") -> Iterator[tuple[Task, Needed]]:
    """Yield the tasks that are not settled, each with the call that it needs next."""
    for task in job.tasks:
        if (step := _next(task, job.asking, known, form)) is not None:
            yield task, step


def _next(task: Task, asking: Asking, known: Known, form: Form = "schema") -> Needed | None:
    """Return the call that a task needs next; None if it is settled, or raises an error, which `_written` reports."""
    try:
        step = settle(task, asking, known, form)
    except InputError:
        raise
    except Exception:
        return None
    return step if isinstance(step, Needed) else None


@dataclass(frozen=True)
class _Kept:
    """Content of a store; the defaults are those of a store that does not exist yet."""

    known: Known = lambda _: None
    """Finds the reply of a call by its key."""
    failures: Callable[[str], int] = lambda _: 0
    """Returns how often a call has failed, by its key."""
    failed: int = 0
    """How often any call has failed."""
    requests: int = 0
    """Number of requests so far."""
    tokens: int = 0
    """Number of tokens spent so far."""


@contextmanager
def _kept(path: Path) -> Iterator[_Kept]:
    """Open the store of earlier runs for reading; a store that does not exist is not created."""
    if not path.exists():
        yield _Kept()
        return
    with Store(path) as store:
        yield _kept_in(store)


def _kept_in(store: Store) -> _Kept:
    return _Kept(store.get, store.failures, store.failed, store.requests, store.spent_tokens)


def _in_turn(job: Job, kept: _Kept) -> list[Task]:
    """Return the tasks that are not settled, in their order; those that failed before come last."""
    failures: Counter[int] = Counter()
    for form in _FORMS if kept.failed else _FORMS[:1]:  # a call may have failed in either form
        for number, task in enumerate(job.tasks):
            if (step := _next(task, job.asking, kept.known, form)) is not None:
                failures[number] += kept.failures(step.call.key)
    return [job.tasks[number] for number in sorted(failures, key=failures.__getitem__)]


def _usual_reply(asking: Asking, task: Task) -> int:
    examples = list(example_turns(asking.prompt(task)))
    lengths = [sum(text_tokens(question + answer) for question, answer in turns) for turns in examples]
    return round(sum(lengths) / len(lengths)) if lengths else _PLAIN_REPLY


def _written(
    job: Job,
    store: Store,
    before: tuple[int, int],
    started: float,
    failures: dict[str, str],
    imported: Imported | None = None,
) -> Result:
    def end_of(task: Task) -> Needed | Settled | None:
        try:
            return settle(task, job.asking, store.get)
        except InputError:
            raise
        except Exception as error:  # an error in one task must not lose the replies of the others
            failures.setdefault(task.id, fault(error))
            return None

    counts = write_output(job.out, job.tasks, end_of, failures)
    calls, tokens = store.calls - before[0], store.tokens - before[1]
    return Result(counts, calls, tokens, store.calls, store.tokens, time.monotonic() - started, failures, imported)
