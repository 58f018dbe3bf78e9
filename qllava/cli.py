"""The command `qllava`: one verb per function.

What a verb needs is imported inside it, so that `qllava --help` and a mistyped flag answer at once. With `--json` a
verb prints one JSON object and nothing else on stdout; whatever a library prints meanwhile goes to stderr. Exit status:
0 done, 1 something is wrong with the input or a verification failed, 2 the command line is wrong.

    qllava doctor
    qllava check train.json --image-folder pictures --model llava-hf/llava-1.5-7b-hf
    qllava inspect train.json --rows 3 --html samples.html
    qllava plan --config recipes/llava15_7b_8gb.yaml
    qllava merge runs/finetune_lora merged
    qllava export merged gguf --format gguf
    qllava chat nano --image photo.jpg --prompt "What is this?"
    qllava eval vqa merged questions.jsonl --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from qllava import __version__
from qllava.config import InputError

T = TypeVar("T")

MODEL_HELP = "nano (the newest finished nano run), a run folder, a merged folder, or a hub name"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status (argparse itself ends a wrong one with status 2)."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except InputError as error:
        print(f"qllava: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qllava: interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qllava", description="Build, tune and use LLaVA on one consumer GPU.")
    parser.add_argument("--version", action="version", version=f"qllava {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    doctor = _verb(verbs, "doctor", run_doctor, "look at this machine and say what is missing")
    _json_flag(doctor)

    check = _verb(verbs, "check", run_check, "read a whole data set before training, and say what is wrong with it")
    check.add_argument("data", metavar="DATA", type=Path, nargs="*", help="files or folders of one data set")
    _reading_flags(check)
    check.add_argument(
        "--eval-file", metavar="FILE", type=Path, help="held-out rows: checked too, and looked for in DATA"
    )
    check.add_argument("--config", metavar="RECIPE.yaml", help="the data and model of a recipe, in place of the flags")
    _json_flag(check)

    inspect = _verb(
        verbs, "inspect", run_inspect, "show samples as the model gets them: pictures, tokens, what is learned"
    )
    inspect.add_argument("data", metavar="DATA", type=Path, help="a file or folder of rows")
    _reading_flags(inspect)
    inspect.add_argument("--rows", metavar="N", type=_positive, help="the first N (default: 8; with --json, all)")
    how = inspect.add_mutually_exclusive_group()
    how.add_argument("--html", metavar="FILE", type=Path, help="write a page with the pictures")
    how.add_argument("--json", action="store_true", help="print one JSON object per line and nothing else on stdout")

    _add_plan(verbs)

    merge = _verb(verbs, "merge", run_merge, "make a standalone model from a run's adapter, and verify it")
    merge.add_argument("folder", metavar="RUN", type=Path, help="folder of a finished run or of one of its checkpoints")
    merge.add_argument("out", metavar="OUT", type=Path, help="folder to write the merged model into")
    merge.add_argument(
        "--base",
        choices=("nf4", "original"),
        default="nf4",
        help="add the adapter to the dequantized 4-bit weights that training saw (default), or to the original ones",
    )
    merge.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    merge.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file (default: 5GB)")
    merge.add_argument("--no-verify", action="store_true", help="do not reload and compare the merged model")
    _json_flag(merge)

    _add_export(verbs)

    chat = _verb(verbs, "chat", run_chat, "ask a model about pictures")
    chat.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    chat.add_argument(
        "--image", metavar="FILE", type=Path, nargs="+", action="extend", default=[], help="show this first"
    )
    chat.add_argument("--prompt", metavar="TEXT", help="ask this, print the answer, and leave")
    chat.add_argument("--load-in-4bit", action="store_true", help="keep the language model in NF4")
    chat.add_argument("--max-new-tokens", metavar="N", type=_positive, default=256, help="(default: 256)")
    chat.add_argument("--temperature", metavar="T", type=_temperature, default=0.0, help="0 is greedy (default: 0)")

    _add_eval(verbs)
    return parser


def _add_plan(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = _verb(verbs, "plan", run_plan, "say how much memory a training run will need, by part, and what would fit")
    plan.add_argument("--config", metavar="RECIPE.yaml", help="a recipe; the flags below are above it")
    plan.add_argument("--model", metavar="MODEL", help="nano (default), a LLaVA's folder or hub name, or a run folder")
    plan.add_argument("--language-model", metavar="L", help="of a new LLaVA; only config.json is read")
    plan.add_argument("--vision-tower", metavar="V", help="of a new LLaVA: open_clip:ARCH/PRETRAINED, or a folder")
    plan.add_argument("--lora-r", metavar="R", type=_rank, help="rank of LoRA; 0 for stage 1, the projector alone")
    plan.add_argument("--tokens-per-row", metavar="N", type=_positive, help="tokens that go through the model at once")
    plan.add_argument("--fit", metavar="12GB", help="choose row size, recomputation and optimizer to stay under this")
    _json_flag(plan)


def _add_export(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = _verb(verbs, "export", run_export, "write a merged model in the format of llama.cpp and Ollama")
    export.add_argument("model", metavar="MODEL", help="a merged folder, or the hub name of a LLaVA")
    export.add_argument("out", metavar="OUT", type=Path, help="folder to write the files into")
    export.add_argument("--format", choices=("gguf",), required=True, help="gguf: llama.cpp, Ollama, LM Studio")
    export.add_argument("--quantize", choices=("f16", "bf16", "q8_0"), default="f16", help="(default: f16)")


def _add_eval(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = verbs.add_parser("eval", help="measure a model", description="Measure a model.")
    kinds = evaluate.add_subparsers(title="evaluations", metavar="EVALUATION", required=True)
    vqa = _verb(kinds, "vqa", run_eval_vqa, "short answers to questions about pictures, exact match")
    vqa.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    vqa.add_argument("data", metavar="DATA", type=Path, help="LLaVA JSON, or rows of question, image, answer and type")
    vqa.add_argument("--image-folder", metavar="DIR", type=Path, help="where the pictures' names begin")
    vqa.add_argument("--out", metavar="FILE", type=Path, help="write every question with its answer, as JSONL")
    _json_flag(vqa)


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    verb.set_defaults(run=run)
    return verb


def _json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def _reading_flags(parser: argparse.ArgumentParser) -> None:
    """Which model will read the data; nano's own parts where nothing is said."""
    parser.add_argument("--image-folder", metavar="DIR", type=Path, help="where the pictures' names begin")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="MODEL", default="nano", help=f"{MODEL_HELP}; its weights are not loaded")
    which.add_argument(
        "--tokenizer", metavar="T", type=Path, help="a tokenizer's file or folder; pictures then count as LLaVA-1.5's"
    )
    parser.add_argument("--template", choices=("plain", "vicuna_v1", "llama_2", "llama_3", "chatml"))
    parser.add_argument("--max-length", metavar="N", type=_positive, default=2048, help="(default: 2048)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, not {text}")
    return value


def _rank(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, not {text}")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, not {text}")
    return value


def _quietly(run: Callable[[], T], as_json: bool) -> T:
    """Run, with what libraries print on stdout sent to stderr when stdout belongs to the JSON."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        return run()


def run_doctor(arguments: argparse.Namespace) -> int:
    """`qllava doctor`: a line per finding; status 1 when training cannot run."""
    from qllava.doctor import examine

    checks = _quietly(examine, arguments.json)
    healthy = all(check.status != "fail" for check in checks)
    if arguments.json:
        print(json.dumps({"ok": healthy, "checks": [asdict(check) for check in checks]}))
    else:
        print("\n".join(check.line() for check in checks))
        print("\nReady: `make finetune` teaches nano to see." if healthy else "\nRepair what says fail first.")
    return 0 if healthy else 1


def run_check(arguments: argparse.Namespace) -> int:
    """`qllava check`: status 1 when a row would not be learned as it is written."""
    from qllava.training.data import Part
    from qllava.training.preview import Source, check_sources, reader_of, sources_of_recipe

    if bool(arguments.data) == bool(arguments.config):
        raise InputError("Name the data to check, or a recipe with --config; one of the two.")

    def run() -> Any:
        if arguments.config:
            return check_sources(*sources_of_recipe(arguments.config))
        reader = reader_of(arguments.model, arguments.tokenizer, arguments.template)

        def source(paths: list[Path]) -> list[Source]:
            return [Source([Part(p, arguments.image_folder) for p in paths], reader, arguments.max_length)]

        return check_sources(source(arguments.data), source([arguments.eval_file] if arguments.eval_file else []))

    verdict = _quietly(run, arguments.json)
    print(json.dumps(verdict.as_json()) if arguments.json else verdict.text())
    return 0 if verdict.ok else 1


def run_inspect(arguments: argparse.Namespace) -> int:
    """`qllava inspect`: the first rows as the model gets them, in the terminal, as a page, or as JSON."""
    from qllava.training.data import Part
    from qllava.training.preview import Source, inspect_rows, reader_of

    out = sys.stdout

    def run() -> None:
        reader = reader_of(arguments.model, arguments.tokenizer, arguments.template)
        source = Source([Part(arguments.data, arguments.image_folder)], reader, arguments.max_length)
        write = (lambda found: print(json.dumps(found), file=out)) if arguments.json else None
        rows = arguments.rows or (None if arguments.json else 8)
        inspect_rows(source, rows=rows, page=arguments.html, write=write)

    _quietly(run, arguments.json)
    return 0


def run_plan(arguments: argparse.Namespace) -> int:
    """`qllava plan`: the peak by part; status 1 when nothing fits."""
    from qllava.training.plan import as_json, as_text, plan

    found = _quietly(
        lambda: plan(
            config=arguments.config,
            model=arguments.model,
            language_model=arguments.language_model,
            vision_tower=arguments.vision_tower,
            lora_r=arguments.lora_r,
            tokens_per_row=arguments.tokens_per_row,
            limit=arguments.fit,
        ),
        arguments.json,
    )
    print(json.dumps(as_json(found)) if arguments.json else as_text(found))
    return 1 if found.fits is False else 0


def run_merge(arguments: argparse.Namespace) -> int:
    """`qllava merge`: status 1 when the merged model does not answer as the adapter does."""
    from qllava.merge import merge

    verify = not arguments.no_verify
    result = _quietly(
        lambda: merge(
            arguments.folder,
            arguments.out,
            base=arguments.base,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            verify=verify,
        ),
        arguments.json,
    )
    if arguments.json:
        print(json.dumps(asdict(result)))
    elif result.kl_per_token is None or result.top1_agreement is None:
        print(f"Merged into {arguments.out}; not verified, as asked.")
    else:
        onto = ", onto the original weights, which training never saw" if result.base == "original" else ""
        held = "and verified" if result.verified else f"and not the model that was trained{onto}"
        print(
            f"Merged into {arguments.out} {held}: {result.kl_per_token:.2e} nats per token from the adapter model, "
            f"{100 * result.top1_agreement:.2f} % of the tokens the same, "
            f"{100 * (result.same_text or 0):.1f} % of the greedy answers."
        )
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """`qllava export`: the files of another program's format."""
    from qllava.export.gguf import export

    for path in export(arguments.model, arguments.out, quantize=arguments.quantize):
        print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    print("How to serve them: docs/serving.md")
    return 0


def run_chat(arguments: argparse.Namespace) -> int:
    """`qllava chat`: one answer with `--prompt`, a conversation without."""
    from qllava.inference import chat_loop

    return chat_loop(
        arguments.model,
        images=arguments.image,
        prompt=arguments.prompt,
        load_in_4bit=arguments.load_in_4bit,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
    )


def run_eval_vqa(arguments: argparse.Namespace) -> int:
    """`qllava eval vqa`: accuracy with its interval, and by type of question."""
    from qllava.evaluation.vqa import evaluate_file

    result = _quietly(
        lambda: evaluate_file(arguments.model, arguments.data, image_folder=arguments.image_folder, out=arguments.out),
        arguments.json,
    )
    if arguments.json:
        print(json.dumps(result))
        return 0
    low, high = result["ci95"]
    print(
        f"{100 * result['accuracy']:.1f} % right: {result['correct']} of {result['n']} "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    )
    for name, accuracy in sorted(result["by_type"].items()):
        print(f"  {name:<16}{100 * accuracy:6.1f} %")
    return 0
