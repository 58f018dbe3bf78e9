"""What `qllava synthesize` does with a language model as the teacher: estimate, ask, write; or through a batch file.

    tasks = make_tasks(read_contexts(path), DEFAULT_TYPES)
    job = Job(tasks, Asking("a-model", Prompts()), Path("out.json"), Path("out.calls.jsonl"))
    result = run(job, "http://127.0.0.1:8000/v1", concurrency=64)

Asking fills the store; the output is then written from the store alone (see `tasks`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qllava.conversation import IMAGE_TOKEN
from qllava.synthesis import rules
from qllava.synthesis.batch import Imported, read_results, write_requests
from qllava.synthesis.live import ask_all
from qllava.synthesis.output import Counts, write_output
from qllava.synthesis.prompting import example_turns
from qllava.synthesis.store import Call, Store
from qllava.synthesis.tasks import Asking, Form, Known, Needed, Settled, Task, settle
from qllava.synthesis.teacher import Teacher, most_tokens, prompt_tokens, text_tokens

TOO_LITTLE = "too little known"
"""Why rules leave a task out: the annotation has nothing that they may ask."""

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
    """Ask what is not kept yet, and write the output; `limits` are Teacher's.

    Raises InputError where no call can succeed, and KeyboardInterrupt; what was answered until then is kept, and the
    output is as it was.
    """
    started = time.monotonic()
    with Store(job.store) as store:
        before = store.calls, store.tokens
        open_tasks = [task for task, _ in needed(job, store.get)]

        async def ask() -> dict[str, str]:
            with tqdm(total=len(job.tasks), initial=len(job.tasks) - len(open_tasks), unit="row", disable=None) as bar:
                async with Teacher(store, base_url, **limits) as teacher:
                    return await ask_all(open_tasks, job.asking, teacher, lambda _: bar.update())

        failures = asyncio.run(ask()) if open_tasks else {}  # where nothing is to be asked no server is needed
        return _written(job, store, before, started, failures)


def run_rules(tasks: Sequence[Task], out: Path, *, seed: int = 0, brief: bool = False) -> Counts:
    """Write what rules make of the pictures; a task that too little is known for is dropped."""

    def end_of(task: Task) -> Settled:
        rows = rules.write(task.context, (task.type,), seed=seed, brief=brief)
        if not rows:
            return Settled((), TOO_LITTLE)
        said = [turn["value"] for turn in rows[0]["conversations"]]
        said[0] = said[0].replace(IMAGE_TOKEN, "").strip()
        return Settled(tuple(zip(said[::2], said[1::2], strict=True)))

    return write_output(out, tqdm(tasks, unit="row", disable=None), end_of, {})


def import_batch(job: Job, results: Path) -> Result:
    """Keep the replies of a batch, and write the output of what is settled."""
    started = time.monotonic()
    with Store(job.store) as store:
        before = store.calls, store.tokens
        forms: tuple[Form, ...] = ("schema", "blocks")
        wanted = {step.call.key: step.call for form in forms for _, step in needed(job, store.get, form)}
        imported = read_results(results, wanted, store)
        return _written(job, store, before, started, {}, imported)


def export_batch(job: Job, requests: Path, max_calls: int | None = None, max_tokens: int | None = None) -> int:
    """Write the calls that are needed next, as many as the budget of the store allows; returns how many."""
    with _kept(job.store) as (known, calls, tokens):

        def affordable() -> Iterator[Call]:
            spent_calls, spent_tokens = calls, tokens
            for _, step in needed(job, known):
                spent_calls, spent_tokens = spent_calls + 1, spent_tokens + most_tokens(step.call)
                if spent_calls > (max_calls or spent_calls) or spent_tokens > (max_tokens or spent_tokens):
                    return
                yield step.call

        return write_requests(requests, affordable())


def estimate(job: Job) -> dict[str, int]:
    """What is still to be asked, in calls and tokens, before anything is repaired and at most.

    A token is taken for four characters, a reply for as long as the worked examples of its type. At most, every reply
    is as long as allowed and is written again once: that costs the prompt, the reply, and another one.
    """
    calls = prompt = completion = most_calls = most = 0
    with _kept(job.store) as (known, _, _):
        for task, step in needed(job, known):
            calls += 1
            prompt += prompt_tokens(step.call)
            completion += _usual_reply(job.asking, task)
            most_calls += 1 if step.repair else 2
            longest = most_tokens(step.call) - prompt_tokens(step.call)
            most += most_tokens(step.call) + (0 if step.repair else most_tokens(step.call) + longest)
    return {
        "tasks": len(job.tasks),
        "calls": calls,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "calls_at_most": most_calls,
        "tokens_at_most": most,
    }


def needed(job: Job, known: Known, form: Form = "schema") -> Iterator[tuple[Task, Needed]]:
    """The tasks that are not settled, each with the call that it needs next."""
    for task in job.tasks:
        step = settle(task, job.asking, known, form)
        if isinstance(step, Needed):
            yield task, step


@contextmanager
def _kept(path: Path) -> Iterator[tuple[Known, int, int]]:
    """The replies that are kept, how many, and their tokens; a store that does not exist is not begun."""
    if not path.exists():
        yield (lambda _: None), 0, 0
        return
    with Store(path) as store:
        yield store.get, store.calls, store.tokens


def _usual_reply(asking: Asking, task: Task) -> int:
    examples = list(example_turns(asking.prompt(task)))
    lengths = [sum(text_tokens(question + answer) for question, answer in turns) for turns in examples]
    return round(sum(lengths) / len(lengths)) if lengths else _PLAIN_REPLY


def _written(
    job: Job,
    store: Store,
    before: tuple[int, int],
    started: float,
    failures: Mapping[str, str],
    imported: Imported | None = None,
) -> Result:
    counts = write_output(job.out, job.tasks, lambda task: settle(task, job.asking, store.get), failures)
    calls, tokens = store.calls - before[0], store.tokens - before[1]
    return Result(counts, calls, tokens, store.calls, store.tokens, time.monotonic() - started, failures, imported)
