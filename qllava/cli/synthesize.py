"""The command `qllava synthesize`: write instruction data from captions and boxes."""

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
from qllava.cli.flags import Verbs, add_verb, json_flag, positive, rank, server_flags
from qllava.config import NANO, InputError
from qllava.runs import REPORT_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qllava.data.contexts import Context
    from qllava.llm.batch import Exported
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
    """Add the command of this module."""
    verb = add_verb(verbs, "synthesize", run_synthesize, "write instruction data from captions and boxes")
    verb.add_argument(
        "contexts",
        metavar="CONTEXTS",
        type=model_name,
        help="JSONL with image, captions and boxes; COCO annotations; or nano",
    )
    verb.add_argument(
        "out", metavar="OUT", type=file_path, help="file for the examples: .json, or .jsonl for one example per line"
    )
    verb.add_argument(
        "--teacher", metavar="NAME", required=True, help="`rules`, or the name of a language model on its server"
    )
    verb.add_argument(
        "--types", metavar="T,...", type=_types, help=f"types of examples: {', '.join(_TYPES)} (default: all but naive)"
    )
    verb.add_argument(
        "--shard", metavar="I/N", type=_shard, default=(1, 1), help="process only part I of N, from 1/N to N/N"
    )
    verb.add_argument(
        "--report",
        metavar="FILE",
        type=file_path,
        help=f"HTML page about the examples (default: {REPORT_FILE} in the folder of OUT)",
    )
    verb.add_argument(
        "--image-folder", metavar="DIR", type=file_path, help="folder of the images, to show some in the report"
    )
    rules = verb.add_argument_group("with --teacher rules")
    rules.add_argument("--seed", metavar="N", type=rank, help="random seed for wording and selection (default: 0)")
    rules.add_argument("--brief", action="store_true", help="write conversations with answers of one or two words")
    _add_asking(verb.add_argument_group("with a language model"))
    json_flag(verb)
    written = {"out": check_written, "report": check_written, "export_batch": check_written, "store": check_kept}
    read = {"contexts": _check_contexts, "image_folder": check_folder, "prompts": check_folder}
    looks(verb, import_batch=check_file, **written, **read)


def _check_contexts(given: str, what: str) -> None:
    if given != NANO:
        check_data(given, what)


def _add_asking(asking: argparse._ArgumentGroup) -> None:
    taken = ("model", "messages", "response_format", "stream", "n")
    server_flags(asking, store="file that stores replies (default: OUT.calls.jsonl)", temperature=0.7, taken=taken)
    asking.add_argument("--style", metavar="S,...", type=_styles, help=f"styles of instructions: {', '.join(_STYLES)}")
    asking.add_argument(
        "--prompts", metavar="DIR", type=file_path, help="folder with your edited copies of the prompt files"
    )
    asking.add_argument(
        "--replies",
        choices=("schema", "blocks"),
        help="format of replies (default: schema if the server supports JSON schemas, else blocks)",
    )
    asking.add_argument("--concurrency", metavar="N", type=positive, help="number of parallel calls (default: 16)")
    asking.add_argument(
        "--retries", metavar="N", type=rank, help="maximum number of retries of a failed call (default: 6)"
    )
    asking.add_argument("--timeout", metavar="S", type=positive, help="seconds to wait for a reply (default: 300)")
    asking.add_argument("--max-calls", metavar="N", type=positive, help="maximum number of requests, over all runs")
    asking.add_argument(
        "--max-tokens-total", metavar="N", type=positive, help="maximum number of tokens, prompts included"
    )
    how = asking.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="estimate calls and tokens without sending any call")
    how.add_argument("--export-batch", metavar="FILE", type=file_path, help="write the missing calls to a batch file")
    how.add_argument(
        "--import-batch", metavar="FILE", type=file_path, nargs="+", help="store the replies of batches, and write OUT"
    )


def run_synthesize(arguments: argparse.Namespace) -> int:
    """Run `qllava synthesize`; return status 1 if a call failed after all retries (the next run sends it again)."""
    from qllava.synthesis.prompting import DEFAULT_TYPES
    from qllava.synthesis.sources import contexts_of
    from qllava.synthesis.tasks import make_tasks, of_shard

    by_rules = arguments.teacher == RULES
    others = _FOR_MODELS if by_rules else _FOR_RULES
    idle = [name for name in others if (given := getattr(arguments, name)) is not None and given is not False]
    if idle:
        flag = f"--{idle[0].replace('_', '-')}"
        other = "NAME (a language model)" if by_rules else "rules"
        raise InputError(
            f"{flag} has no effect with --teacher {arguments.teacher}. Remove {flag}, or give --teacher {other}."
        )
    types = arguments.types or DEFAULT_TYPES
    if arguments.style and not {"conversation", "reasoning"} & set(types):
        raise InputError(
            f"--style has no effect on {' and '.join(types)}, whose questions come from a list. Remove --style."
        )
    contexts = of_shard(contexts_of(arguments.contexts), *arguments.shard)
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
    """Return the job of a command line; raise InputError before a call is sent or a file is written."""
    from qllava.synthesis.output import beside
    from qllava.synthesis.pipeline import Job
    from qllava.synthesis.prompting import Prompts
    from qllava.synthesis.tasks import PARAMETERS, Asking

    parameters = PARAMETERS if arguments.parameters is None else arguments.parameters
    asking = Asking(arguments.teacher, Prompts(arguments.prompts), parameters, arguments.replies)
    for task in tasks:  # read every prompt file before the first call
        if task.type != "naive":
            asking.prompt(task)
    return Job(tasks, asking, arguments.out, arguments.store or beside(arguments.out, "calls"))


def _write_report(arguments: argparse.Namespace, contexts: Sequence[Context]) -> Path:
    from qllava.data.records import read_records
    from qllava.synthesis.report import write_report
    from qllava.synthesis.sources import image_folder

    path: Path = arguments.report or arguments.out.with_name(REPORT_FILE)
    rows = [row for _, row in read_records(arguments.out)]
    try:
        write_report(rows, contexts, path, arguments.image_folder or image_folder(arguments.contexts))
    except OSError as error:
        raise InputError(
            f"{path}: the report cannot be written ({error.strerror}). Give another file with --report."
        ) from error
    return path


def _say(
    arguments: argparse.Namespace, counts: Counts, as_json: dict[str, Any], remarks: Sequence[str], report: Path
) -> None:
    """Print the result of a run."""
    if arguments.json:
        print(json.dumps({"out": str(arguments.out), "report": str(report), **as_json}))
    else:
        print(
            "\n".join([counts.text(), *remarks, f"{arguments.out}: {as_json['rows']:,} examples. Statistics: {report}"])
        )


def _remarks(result: Result, job: Job, imported: bool) -> list[str]:
    """Return lines about the calls that were made and the calls that are still missing."""
    from qllava.synthesis.output import beside

    lines = []
    if result.imported is not None:
        found = result.imported
        lines.append(
            f"Batch: {found.replies:,} new replies, {found.known:,} known replies, {found.failed:,} failed requests, "
            f"{found.foreign:,} replies to other calls."
        )
    lines.append(f"{result.calls:,} calls, {result.tokens:,} tokens; {job.store} keeps {result.calls_kept:,}.")
    failed, left = result.counts.total("failed"), result.counts.total("left")
    if failed:
        first = next(task.id for task in job.tasks if task.id in result.failures)
        lines.append(
            f"{failed:,} calls failed. First: {first}: {result.failures[first]}. The same command retries them after "
            f"all others. All failed calls are listed in {beside(job.out, 'left_out')}."
        )
    if left:
        how = "write them with --export-batch" if imported else "the budget is spent; run again with a larger one"
        lines.append(f"{left:,} calls are still missing: {how}.")
    return lines


def _export_text(exported: Exported) -> str:
    first, *rest = exported.files
    where = f"{first} to {rest[-1].name} ({len(exported.files)} files)" if rest else str(first)
    nothing = "" if exported.calls else " All calls have replies already, so the file is empty."
    return f"{where}: {exported.calls:,} calls.{nothing}"


def _estimate_text(expected: dict[str, int], max_calls: int | None, max_tokens: int | None) -> str:
    limits = []
    if max_calls is not None:
        limits.append(
            f"--max-calls {max_calls:,} limits the number of requests, including repairs, retries "
            f"and earlier runs; {expected['requests_so_far']:,} were sent so far."
        )
    if max_tokens is not None:
        limits.append(
            f"--max-tokens-total {max_tokens:,} limits the tokens of prompts and replies, including earlier runs. A "
            f"request is sent only if its maximum cost still fits. {expected['tokens_so_far']:,} were used so far."
        )
    tokens = expected["prompt_tokens"] + expected["completion_tokens"]
    return (
        f"{expected['tasks']:,} examples to write with {expected['calls']:,} calls, about {tokens:,} tokens "
        f"({expected['prompt_tokens']:,} of prompts, {expected['completion_tokens']:,} of replies).\n"
        f"Upper bound, if every reply has the maximum length and needs a repair: {expected['calls_at_most']:,} "
        f"calls, {expected['tokens_at_most']:,} tokens (one token per byte of a prompt). Including all retries "
        f"that --retries allows: {expected['requests_at_most']:,} requests.\n"
        + "".join(f"{limit}\n" for limit in limits)
        + "The estimate counts one token per four Latin characters or per other character, and replies as "
        "long as the worked examples. No call was sent."
    )


def _types(text: str) -> tuple[str, ...]:
    return _names(text, _TYPES)


def _styles(text: str) -> tuple[str, ...]:
    return _names(text, _STYLES)


def _names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Parse comma-separated names; each must be known and given once."""
    names = tuple(text.split(","))
    if len(set(names)) < len(names) or not set(names) <= set(known):
        raise argparse.ArgumentTypeError(
            f"expected a comma-separated list of {','.join(known)}, each at most once, not {text}"
        )
    return names


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N, from 1/N to N/N, not {text}")
    return int(number), int(count)
