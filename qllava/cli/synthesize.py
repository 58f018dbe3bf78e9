"""The verb `qllava synthesize`: instruction data from captions and boxes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qllava.arguments import (
    check_data,
    check_file,
    check_folder,
    check_kept,
    check_written,
    file_path,
    looks,
    model_name,
)
from qllava.cli.flags import Verbs, add_verb, json_flag, parameters_flag, positive, rank
from qllava.config import NANO, InputError
from qllava.runs import REPORT_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qllava.llm.batch import Exported
    from qllava.synthesis.contexts import Context
    from qllava.synthesis.output import Counts
    from qllava.synthesis.pipeline import Job, Result
    from qllava.synthesis.tasks import Task

RULES = "rules"

_TYPES = ("conversation", "detail", "reasoning", "naive")
_STYLES = ("task", "steps", "format", "length", "unbiased", "perspectives", "clear")
_FOR_RULES = ("seed", "brief")
_FOR_MODELS = (
    *("base_url", "style", "prompts", "parameters", "replies", "store", "concurrency", "retries", "timeout"),
    *("max_calls", "max_tokens_total", "dry_run", "export_batch", "import_batch"),
)


def add(verbs: Verbs) -> None:
    """Add the verb of this module."""
    verb = add_verb(verbs, "synthesize", run_synthesize, "write instruction data from captions and boxes")
    verb.add_argument(
        "contexts",
        metavar="CONTEXTS",
        type=model_name,
        help="JSONL of image, captions and boxes; COCO's annotations; nano",
    )
    verb.add_argument(
        "out", metavar="OUT", type=file_path, help="examples to write: .json, or .jsonl for an example a line"
    )
    verb.add_argument("--teacher", metavar="NAME", required=True, help="rules, or the name of a language model")
    verb.add_argument("--types", metavar="T,...", type=_types, help=f"of {', '.join(_TYPES)} (default: all but naive)")
    verb.add_argument("--shard", metavar="I/N", type=_shard, default=(1, 1), help="part I of N, from 1/N to N/N")
    verb.add_argument(
        "--report", metavar="FILE", type=file_path, help=f"page about the examples (default: {REPORT_FILE} by OUT)"
    )
    verb.add_argument("--image-folder", metavar="DIR", type=file_path, help="the images, for the report's samples")
    rules = verb.add_argument_group("with --teacher rules")
    rules.add_argument("--seed", metavar="N", type=rank, help="of wording and choice (default: 0)")
    rules.add_argument("--brief", action="store_true", help="conversations with answers of a word or two")
    _add_asking(verb.add_argument_group("with a language model"))
    json_flag(verb)
    written = {"out": check_written, "report": check_written, "export_batch": check_written, "store": check_kept}
    read = {"contexts": _check_contexts, "image_folder": check_folder, "prompts": check_folder}
    looks(verb, import_batch=check_file, **written, **read)


def _check_contexts(given: str, what: str) -> None:
    if given != NANO:
        check_data(given, what)


def _add_asking(asking: argparse._ArgumentGroup) -> None:
    asking.add_argument("--base-url", metavar="URL", help="of its server (default: OPENAI_BASE_URL, else OpenAI's)")
    asking.add_argument("--style", metavar="S,...", type=_styles, help=f"of instructions: {', '.join(_STYLES)}")
    asking.add_argument("--prompts", metavar="DIR", type=file_path, help="changed copies of the prompts' files")
    parameters_flag(asking, 0.7, ("model", "messages", "response_format", "stream", "n"))
    asking.add_argument(
        "--replies", choices=("schema", "blocks"), help="their form (default: JSON by a schema where the server can)"
    )
    asking.add_argument(
        "--store", metavar="FILE", type=file_path, help="where replies are kept (default: OUT.calls.jsonl)"
    )
    asking.add_argument("--concurrency", metavar="N", type=positive, help="calls at a time (default: 16)")
    asking.add_argument("--retries", metavar="N", type=rank, help="attempts after the first (default: 6)")
    asking.add_argument("--timeout", metavar="S", type=positive, help="seconds to wait for a reply (default: 300)")
    asking.add_argument("--max-calls", metavar="N", type=positive, help="maximum number of requests, of all runs")
    asking.add_argument(
        "--max-tokens-total", metavar="N", type=positive, help="maximum number of tokens, prompts included"
    )
    how = asking.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="estimate calls and tokens, and ask nobody")
    how.add_argument(
        "--export-batch", metavar="FILE", type=file_path, help="write the calls that are needed as a batch file"
    )
    how.add_argument(
        "--import-batch", metavar="FILE", type=file_path, nargs="+", help="keep the replies of batches, and write OUT"
    )


def run_synthesize(arguments: argparse.Namespace) -> int:
    """`qllava synthesize`: status 1 when a call has no reply after every attempt; the next run asks it again."""
    from qllava.synthesis.contexts import read_contexts
    from qllava.synthesis.prompting import DEFAULT_TYPES
    from qllava.synthesis.tasks import make_tasks, of_shard

    by_rules = arguments.teacher == RULES
    others = _FOR_MODELS if by_rules else _FOR_RULES
    idle = [name for name in others if (given := getattr(arguments, name)) is not None and given is not False]
    if idle:
        flag = f"--{idle[0].replace('_', '-')}"
        other = "the name of a language model" if by_rules else "rules"
        raise InputError(f"{flag} has no effect with --teacher {arguments.teacher}; leave it out, or give {other}.")
    types = arguments.types or DEFAULT_TYPES
    if arguments.style and not {"conversation", "reasoning"} & set(types):
        raise InputError(f"--style has no effect on {' and '.join(types)}, whose questions are drawn from a list.")
    contexts = of_shard(read_contexts(arguments.contexts), *arguments.shard)
    tasks = make_tasks(contexts, types, arguments.style or ())
    return (_by_rules if by_rules else _by_model)(arguments, contexts, tasks)


def _by_rules(arguments: argparse.Namespace, contexts: Sequence[Context], tasks: Sequence[Task]) -> int:
    from qllava.synthesis import pipeline

    counts = pipeline.run_rules(tasks, arguments.out, seed=arguments.seed or 0, brief=arguments.brief)
    _say(arguments, counts, counts.to_json(), [], _write_report(arguments, contexts))
    return 0


def _by_model(arguments: argparse.Namespace, contexts: Sequence[Context], tasks: Sequence[Task]) -> int:
    from qllava.synthesis import pipeline

    job = _job(arguments, tasks)
    budget = {"max_calls": arguments.max_calls, "max_tokens": arguments.max_tokens_total}
    if arguments.dry_run:
        retries = {} if arguments.retries is None else {"retries": arguments.retries}
        expected = pipeline.estimate(job, **retries)
        found = {"dry_run": True, **expected, "max_calls": arguments.max_calls, "max_tokens": budget["max_tokens"]}
        print(json.dumps(found) if arguments.json else _estimate_text(expected, **budget))
        return 0
    if arguments.export_batch:
        exported = pipeline.export_batch(job, arguments.export_batch, **budget)
        files = [str(file) for file in exported.files]
        print(json.dumps({"exported": exported.calls, "files": files}) if arguments.json else _export_text(exported))
        return 0
    if arguments.import_batch:
        result = pipeline.import_batch(job, arguments.import_batch)
    else:
        given = {name: getattr(arguments, name) for name in ("concurrency", "retries", "timeout")}
        limits = {name: value for name, value in given.items() if value is not None}
        result = pipeline.run(job, arguments.base_url, **limits, **budget)
    report = _write_report(arguments, contexts)
    _say(arguments, result.counts, result.to_json(), _remarks(result, job, bool(arguments.import_batch)), report)
    return 1 if result.counts.total("failed") else 0


def _job(arguments: argparse.Namespace, tasks: Sequence[Task]) -> Job:
    """The job of a command line. Raises InputError before anything is asked or written."""
    from qllava.synthesis.output import beside
    from qllava.synthesis.pipeline import Job
    from qllava.synthesis.prompting import Prompts
    from qllava.synthesis.tasks import PARAMETERS, Asking

    parameters = PARAMETERS if arguments.parameters is None else arguments.parameters
    asking = Asking(arguments.teacher, Prompts(arguments.prompts), parameters, arguments.replies)
    for task in tasks:  # every prompt that is used is read, once, before the first call
        if task.type != "naive":
            asking.prompt(task)
    return Job(tasks, asking, arguments.out, arguments.store or beside(arguments.out, "calls"))


def _write_report(arguments: argparse.Namespace, contexts: Sequence[Context]) -> Path:
    from qllava.data.records import read_records
    from qllava.synthesis.contexts import image_folder
    from qllava.synthesis.report import write_report

    path: Path = arguments.report or arguments.out.with_name(REPORT_FILE)
    rows = [row for _, row in read_records(arguments.out)]
    try:
        write_report(rows, contexts, path, arguments.image_folder or image_folder(arguments.contexts))
    except OSError as error:
        raise InputError(f"{path}: the report cannot be written ({error.strerror}); name another --report.") from error
    return path


def _say(
    arguments: argparse.Namespace, counts: Counts, as_json: dict[str, Any], remarks: Sequence[str], report: Path
) -> None:
    """Print how it ended."""
    if arguments.json:
        print(json.dumps({"out": str(arguments.out), "report": str(report), **as_json}))
    else:
        print(
            "\n".join(
                [counts.text(), *remarks, f"{arguments.out}: {as_json['rows']:,} examples. What they hold: {report}"]
            )
        )


def _remarks(result: Result, job: Job, imported: bool) -> list[str]:
    """What a user should know about calls, and do about tasks that are not settled."""
    from qllava.synthesis.output import beside

    lines = []
    if result.imported is not None:
        found = result.imported
        lines.append(
            f"Of the batch {found.replies:,} replies are new, {found.known:,} were known, {found.failed:,} requests "
            f"failed, {found.foreign:,} belong to something else."
        )
    lines.append(f"{result.calls:,} calls, {result.tokens:,} tokens; {job.store} keeps {result.calls_kept:,}.")
    failed, left = result.counts.total("failed"), result.counts.total("left")
    if failed:
        first = next(task.id for task in job.tasks if task.id in result.failures)
        lines.append(
            f"{failed:,} failed, the first, {first}: {result.failures[first]}. The same command asks them again, after "
            f"all others; {beside(job.out, 'left_out')} names each."
        )
    if left:
        how = "--export-batch writes the calls" if imported else "the budget is spent, a larger one goes on"
        lines.append(f"{left:,} are still to be asked: {how}.")
    return lines


def _export_text(exported: Exported) -> str:
    first, *rest = exported.files
    where = f"{first} to {rest[-1].name} ({len(exported.files)} files)" if rest else str(first)
    nothing = "" if exported.calls else " Nothing is left to ask: the file is empty."
    return f"{where}: {exported.calls:,} calls.{nothing}"


def _estimate_text(expected: dict[str, int], max_calls: int | None, max_tokens: int | None) -> str:
    limits = []
    if max_calls is not None:
        limits.append(
            f"--max-calls {max_calls:,} bounds the requests that are sent, repairs, further attempts and earlier runs "
            f"included; {expected['requests_so_far']:,} were sent."
        )
    if max_tokens is not None:
        limits.append(
            f"--max-tokens-total {max_tokens:,} bounds the tokens of prompts and replies, earlier runs included; a "
            f"request is sent only when the most that it can cost still fits; {expected['tokens_so_far']:,} were spent."
        )
    tokens = expected["prompt_tokens"] + expected["completion_tokens"]
    return (
        f"{expected['tasks']:,} examples to make; {expected['calls']:,} calls to ask, about {tokens:,} tokens "
        f"({expected['prompt_tokens']:,} of prompts, {expected['completion_tokens']:,} of replies).\n"
        f"At most, if every reply is as long as allowed and must be written again: {expected['calls_at_most']:,} "
        f"calls, {expected['tokens_at_most']:,} tokens (one for each byte of a prompt). With every further attempt "
        f"that --retries allows: {expected['requests_at_most']:,} requests.\n"
        + "".join(f"{limit}\n" for limit in limits)
        + "A token is taken for four characters, or one that is not Latin; a reply for as long as the worked "
        "examples. Nobody was asked."
    )


def _types(text: str) -> tuple[str, ...]:
    return _names(text, _TYPES)


def _styles(text: str) -> tuple[str, ...]:
    return _names(text, _STYLES)


def _names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Names with commas between them, each known and given once."""
    names = tuple(text.split(","))
    if len(set(names)) < len(names) or not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, each once, not {text}")
    return names


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N, from 1/N to N/N, not {text}")
    return int(number), int(count)
