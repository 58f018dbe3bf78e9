"""What `qllava synthesize` does with a language model as the teacher: estimate, ask, write; or through a batch file.

    tasks = make_tasks(read_contexts(path), DEFAULT_TYPES)
    job = Job(tasks, Asking("a-model", Prompts()), Path("out.json"), Path("out.calls.jsonl"))
    result = run(job, "http://127.0.0.1:8000/v1", concurrency=64)

Asking fills the store; the output is then written from the store alone (see `tasks`).
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
"""Why rules leave a task out: the annotation has nothing that they may ask."""

_FORMS: tuple[Form, ...] = ("schema", "blocks")
_REPAIR_TOKENS = 1000  # of the request to write a reply again, at most: the sentences of all rules
_PLAIN_REPLY = 300  # tokens, where a user's prompt has no worked example to measure


@dataclass(frozen=True)
class Job:
    """What is to be made, how, and where it is written and kept."""

    tasks: Sequence[Task]
    asking: Asking
    out: Path
    store: Path


@dataclass(frozen=True)
class Result:
    """How a job ended."""

    counts: Counts
    calls: int  # replies that are new in the store
    tokens: int  # what they cost
    calls_kept: int  # replies in the store now
    tokens_kept: int
    seconds: float
    failures: Mapping[str, str]  # why tasks failed, by their ids
    imported: Imported | None = None

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
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
    """Ask what is not kept yet, and write the output; `limits` are Client's.

    Raises InputError where no call can succeed, and KeyboardInterrupt; what was answered until then is kept, and the
    output is as it was.
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

        failures = asyncio.run(ask()) if open_tasks else {}  # where nothing is to be asked no server is needed
        return _written(job, store, before, started, failures)


def run_rules(tasks: Sequence[Task], out: Path, *, seed: int = 0, brief: bool = False) -> Counts:
    """Write what rules make of the images; a task that too little is known for is dropped."""

    def end_of(task: Task) -> Settled:
        records = rules.write(task.context, (task.type,), seed=seed, brief=brief)
        if not records:
            return Settled((), TOO_LITTLE)
        said = [turn["value"] for turn in records[0]["conversations"]]
        said[0] = said[0].replace(IMAGE_TOKEN, "").strip()
        return Settled(tuple(zip(said[::2], said[1::2], strict=True)))

    return write_output(out, tqdm(tasks, unit="example", disable=None), end_of, {})


def import_batch(job: Job, results: Sequence[Path]) -> Result:
    """Keep the replies of a batch, in one or several files, and write the output of what is settled."""
    started = time.monotonic()
    with Store(job.store) as store:
        before = store.calls, store.tokens
        imported = read_results(results, _wanted(job, store), store)
        return _written(job, store, before, started, {}, imported)


def _wanted(job: Job, store: Store) -> Callable[[str], Call | None]:
    """Return what finds a call that the job needs next by its key: a million keys are held, and no call."""
    found: set[str] = set()

    def known(key: str) -> Reply | None:  # as it was before the import, whatever that has kept by now
        return None if key in found else store.get(key)

    numbers: dict[bytes, int] = {}
    for at, form in enumerate(_FORMS):
        for number, task in enumerate(job.tasks):
            if (step := _next(task, job.asking, known, form)) is not None:
                numbers[bytes.fromhex(step.call.key)] = len(_FORMS) * number + at

    def call_of(key: str) -> Call | None:
        try:
            number, at = divmod(numbers[bytes.fromhex(key)], len(_FORMS))
        except (KeyError, ValueError):  # of another command, or no key at all
            return None
        step = _next(job.tasks[number], job.asking, known, _FORMS[at])
        if step is None:
            return None
        found.add(step.call.key)  # the one text that the store keeps, too
        return step.call

    return call_of


def export_batch(job: Job, requests: Path, max_calls: int | None = None, max_tokens: int | None = None) -> Exported:
    """Write the calls that are needed next, those that failed before last, as many as the budget allows.

    Raises InputError when a file cannot be written, and for a limit of tokens where a reply may have any length.
    """
    with _kept(job.store) as kept:

        def affordable() -> Iterator[Call]:
            calls, tokens = kept.requests, kept.tokens
            # Where nothing has failed the order stays, and `_next` below passes over what is settled.
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
    """What is still to be asked, in calls and tokens: probably, and at most.

    Probably: a token is taken for four characters, or one of another script than Latin; a reply for as long as the
    worked examples of its type; nothing is written again. At most: a prompt has a token for each byte, every reply is
    as long as allowed and is written again once, which costs the prompt, the reply, and another one; and each request
    is tried again as often as it may be.
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
    """The tasks that are not settled, each with the call that it needs next."""
    for task in job.tasks:
        if (step := _next(task, job.asking, known, form)) is not None:
            yield task, step


def _next(task: Task, asking: Asking, known: Known, form: Form = "schema") -> Needed | None:
    """The call that a task needs next; None where it is settled, or has a fault, which `_written` reports."""
    try:
        step = settle(task, asking, known, form)
    except InputError:
        raise
    except Exception:
        return None
    return step if isinstance(step, Needed) else None


@dataclass(frozen=True)
class _Kept:
    """What a store holds, which may not exist yet."""

    known: Known = lambda _: None
    failures: Callable[[str], int] = lambda _: 0
    failed: int = 0
    requests: int = 0
    tokens: int = 0


@contextmanager
def _kept(path: Path) -> Iterator[_Kept]:
    """What earlier runs have kept; a store that does not exist is not begun."""
    if not path.exists():
        yield _Kept()
        return
    with Store(path) as store:
        yield _kept_in(store)


def _kept_in(store: Store) -> _Kept:
    return _Kept(store.get, store.failures, store.failed, store.requests, store.spent_tokens)


def _in_turn(job: Job, kept: _Kept) -> list[Task]:
    """The tasks that are not settled, in their order; those that failed before come after all others."""
    failures: Counter[int] = Counter()
    for form in _FORMS if kept.failed else _FORMS[:1]:  # a call may have failed in either
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
        except Exception as error:  # of one task; what the others have cost is not lost by it
            failures.setdefault(task.id, fault(error))
            return None

    counts = write_output(job.out, job.tasks, end_of, failures)
    calls, tokens = store.calls - before[0], store.tokens - before[1]
    return Result(counts, calls, tokens, store.calls, store.tokens, time.monotonic() - started, failures, imported)
