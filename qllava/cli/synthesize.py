"""The verb `qllava synthesize`: instruction data from captions and boxes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qllava.cli.flags import Verbs, add_verb, json_flag, positive
from qllava.config import InputError

_TYPES = ("conversation", "detail", "reasoning", "naive")
_STYLES = ("task", "steps", "format", "length", "unbiased", "perspectives", "clear")


def add(verbs: Verbs) -> None:
    """Add the verb of this module."""
    verb = add_verb(verbs, "synthesize", run_synthesize, "write instruction data from captions and boxes")
    verb.add_argument(
        "contexts", metavar="CONTEXTS", help="JSONL of image, captions and boxes; COCO's annotations; nano"
    )
    verb.add_argument("out", metavar="OUT", type=Path, help="rows to write: .json, or .jsonl for a row a line")
    verb.add_argument("--teacher", metavar="NAME", required=True, help="rules, or the name of a language model")
    verb.add_argument("--base-url", metavar="URL", help="of its server (default: OPENAI_BASE_URL, else OpenAI's)")
    verb.add_argument("--types", metavar="T,...", type=_types, help=f"of {', '.join(_TYPES)} (default: all but naive)")
    verb.add_argument(
        "--style", metavar="S,...", type=_styles, default=(), help=f"of instructions: {', '.join(_STYLES)}"
    )
    verb.add_argument("--prompts", metavar="DIR", type=Path, help="changed copies of the prompts' files")
    _add_asking(verb)
    _add_scale(verb)
    json_flag(verb)


def _add_asking(verb: argparse.ArgumentParser) -> None:
    asking = verb.add_argument_group("asking a language model")
    asking.add_argument(
        "--parameters",
        metavar="JSON",
        type=_object,
        help='of every call (default: {"temperature": 0.7, "max_tokens": 1024})',
    )
    asking.add_argument(
        "--replies",
        choices=("auto", "schema", "blocks"),
        default="auto",
        help="form of replies: JSON by a schema, blocks, or JSON where the server can (default)",
    )
    asking.add_argument("--store", metavar="FILE", type=Path, help="where replies are kept (default: OUT.calls.jsonl)")
    asking.add_argument("--concurrency", metavar="N", type=positive, default=16, help="calls at a time (default: 16)")
    asking.add_argument(
        "--retries", metavar="N", type=positive, default=6, help="attempts after the first (default: 6)"
    )
    asking.add_argument(
        "--timeout", metavar="SECONDS", type=positive, default=300, help="to wait for a reply (default: 300)"
    )
    asking.add_argument("--max-calls", metavar="N", type=positive, help="never more calls than this in the store")
    asking.add_argument(
        "--max-tokens-total", metavar="N", type=positive, help="nor more tokens, of prompts and replies"
    )


def _add_scale(verb: argparse.ArgumentParser) -> None:
    scale = verb.add_argument_group("scale")
    scale.add_argument(
        "--shard", metavar="I/N", type=_shard, default=(1, 1), help="the I-th of N parts, from 1/N to N/N"
    )
    how = scale.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="estimate calls and tokens, and ask nobody")
    how.add_argument(
        "--export-batch", metavar="FILE", type=Path, help="write the calls that are needed as a batch file"
    )
    how.add_argument("--import-batch", metavar="FILE", type=Path, help="keep the replies of a batch, and write OUT")


def run_synthesize(arguments: argparse.Namespace) -> int:
    """`qllava synthesize`: status 1 when a call has no reply after every attempt; the next run asks it again."""
    from qllava.synthesis import pipeline

    job = _job(arguments)
    store = f"{job.store.name} keeps what was answered"
    if arguments.dry_run:
        expected = pipeline.estimate(job)
        _say(arguments, {"dry_run": True, **expected}, _estimate_text(expected))
        return 0
    if arguments.export_batch:
        calls = pipeline.export_batch(job, arguments.export_batch, arguments.max_calls, arguments.max_tokens_total)
        nothing = "" if calls else " Nothing is left to ask: the file is empty."
        _say(arguments, {"exported": calls}, f"{arguments.export_batch}: {calls:,} calls.{nothing}")
        return 0
    if arguments.import_batch:
        result = pipeline.import_batch(job, arguments.import_batch)
    else:
        result = pipeline.run(
            job,
            arguments.base_url,
            concurrency=arguments.concurrency,
            timeout=float(arguments.timeout),
            retries=arguments.retries,
            max_calls=arguments.max_calls,
            max_tokens=arguments.max_tokens_total,
        )
    lines = [result.counts.text(), f"{result.calls:,} calls, {result.tokens:,} tokens; {store}."]
    counts = result.counts
    if counts.total("failed"):
        why = next(iter(result.failures.values()))
        lines.append(f"{counts.total('failed'):,} had no reply ({why}); the same command asks them again.")
    if counts.total("left"):
        how = "--export-batch writes the calls" if arguments.import_batch else "a larger budget asks them"
        lines.append(f"{counts.total('left'):,} are still to be asked: {how}.")
    lines.append(f"{job.out}: {counts.to_json()['rows']:,} rows")
    _say(arguments, {"out": str(job.out), **result.to_json()}, "\n".join(lines))
    return 1 if counts.total("failed") else 0


def _job(arguments: argparse.Namespace) -> Any:
    """The job of a command line. Raises InputError before anything is asked or written."""
    from qllava.synthesis.contexts import read_contexts
    from qllava.synthesis.output import beside
    from qllava.synthesis.pipeline import Job
    from qllava.synthesis.prompting import DEFAULT_TYPES, Prompts
    from qllava.synthesis.tasks import PARAMETERS, Asking, make_tasks, of_shard

    if not arguments.out.parent.is_dir() or arguments.out.is_dir():
        raise InputError(f"{arguments.out} cannot be written: name a file in a folder that exists.")
    prompts = Prompts(arguments.prompts)
    contexts = of_shard(read_contexts(arguments.contexts), *arguments.shard)
    tasks = make_tasks(contexts, arguments.types or DEFAULT_TYPES, arguments.style)
    form = None if arguments.replies == "auto" else arguments.replies
    parameters = PARAMETERS if arguments.parameters is None else arguments.parameters
    asking = Asking(arguments.teacher, prompts, parameters, form)
    for type_, style in {(task.type, task.style) for task in tasks if task.type != "naive"}:
        prompts.prompt(type_, style)
    return Job(tasks, asking, arguments.out, arguments.store or beside(arguments.out, "calls"))


def _say(arguments: argparse.Namespace, as_json: dict[str, Any], text: str) -> None:
    print(json.dumps(as_json) if arguments.json else text)


def _estimate_text(expected: dict[str, int]) -> str:
    tokens = expected["prompt_tokens"] + expected["completion_tokens"]
    return (
        f"{expected['tasks']:,} rows to make; {expected['calls']:,} calls to ask, about {tokens:,} tokens "
        f"({expected['prompt_tokens']:,} of prompts, {expected['completion_tokens']:,} of replies).\n"
        f"At most, if every reply is as long as allowed and must be written again: {expected['calls_at_most']:,} "
        f"calls, {expected['tokens_at_most']:,} tokens.\n"
        "A token is taken for four characters, a reply for as long as the worked examples. Nobody was asked."
    )


def _types(text: str) -> tuple[str, ...]:
    return _names(text, _TYPES)


def _styles(text: str) -> tuple[str, ...]:
    return _names(text, _STYLES)


def _names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """A list of names without blanks, each known and given once."""
    names = tuple(text.split(","))
    wrong = [name for name in names if name not in known]
    if wrong or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, each once, not {text}")
    return names


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N from 1/N to N/N, not {text}")
    return int(number), int(count)


def _object(text: str) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, not {text} ({error})") from error
    if not isinstance(read, dict) or {"model", "messages", "response_format", "stream", "n"} & set(read):
        raise argparse.ArgumentTypeError(
            "expected a JSON object of parameters such as temperature; model, messages, response_format, stream and n "
            "are set by qllava"
        )
    return read
