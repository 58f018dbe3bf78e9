"""The commands to use before training: doctor, check, inspect, plan."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qllava.arguments import (
    base_flag,
    check_data,
    check_file,
    check_model,
    check_part,
    check_written,
    file_path,
    looks,
    model_name,
)
from qllava.cli.flags import Verbs, add_verb, html_flag, json_flag, positive, quietly, rank, reading_flags
from qllava.config import InputError
from qllava.training.options.sizes import check_bytes


def add(verbs: Verbs) -> None:
    """Add the commands of this module."""
    doctor = add_verb(verbs, "doctor", run_doctor, "check this machine and list what is missing")
    json_flag(doctor)
    _add_check(verbs)
    _add_inspect(verbs)
    _add_plan(verbs)


def _add_check(verbs: Verbs) -> None:
    check = add_verb(verbs, "check", run_check, "check a whole data set before training and list its problems")
    check.add_argument("data", metavar="DATA", type=file_path, nargs="*", help="files or folders of the data set")
    reading_flags(check)
    check.add_argument(
        "--eval-file",
        metavar="FILE",
        type=file_path,
        help="held-out examples: check them, and report those that are also in DATA",
    )
    check.add_argument(
        "--config",
        metavar="RECIPE.yaml",
        type=model_name,
        help="recipe whose data and model to check, instead of the flags",
    )
    json_flag(check)
    looks(check, data=check_data, eval_file=check_data, config=_check_recipe)


def _add_inspect(verbs: Verbs) -> None:
    inspect = add_verb(
        verbs, "inspect", run_inspect, "show samples as the model sees them: images, tokens, which tokens are learned"
    )
    inspect.add_argument("data", metavar="DATA", type=file_path, help="a file or folder of examples")
    reading_flags(inspect)
    inspect.add_argument(
        "--rows",
        metavar="N",
        type=positive,
        help="number of examples to show, from the first (default: 8; with --json, all)",
    )
    how = inspect.add_mutually_exclusive_group()
    html_flag(how, "the images")
    how.add_argument("--json", action="store_true", help="print one JSON object per line and nothing else on stdout")
    looks(inspect, data=check_data, html=check_written)


def _add_plan(verbs: Verbs) -> None:
    plan = add_verb(verbs, "plan", run_plan, "estimate the memory of a run, by part, and find settings that fit")
    plan.add_argument("--config", metavar="RECIPE.yaml", type=model_name, help="recipe file; flags override its values")
    plan.add_argument(
        "--model",
        metavar="MODEL",
        type=model_name,
        help="nano (default), the folder or hub name of a LLaVA, or a run folder",
    )
    plan.add_argument(
        "--language-model",
        metavar="L",
        type=model_name,
        help="language model of a new LLaVA; only its config.json is read",
    )
    plan.add_argument(
        "--vision-tower",
        metavar="V",
        type=model_name,
        help="vision tower of a new LLaVA: open_clip:ARCH/PRETRAINED, or a folder",
    )
    plan.add_argument(
        "--lora-r", metavar="R", type=rank, help="rank of LoRA; 0 is stage 1, which trains only the projector"
    )
    plan.add_argument("--tokens-per-pack", metavar="N", type=positive, help="maximum number of tokens in one pack")
    plan.add_argument(
        "--fit", metavar="12GB", help="memory limit: choose pack size, recomputation and optimizer to stay below it"
    )
    base_flag(plan)
    json_flag(plan)
    parts = {"model": check_model, "language_model": check_model, "vision_tower": check_part}
    looks(plan, config=_check_recipe, **parts, fit=check_bytes)


def _check_recipe(path: str, what: str) -> None:
    """Raise InputError for a recipe that does not exist, or has unknown keys or invalid values."""
    from qllava.training.options import command

    check_file(path, what)
    command.read(["--config", path], output_dir="", nano={})


def run_doctor(arguments: argparse.Namespace) -> int:
    """Run `qllava doctor`: print a line per check; return status 1 if training cannot run."""
    from qllava.doctor import examine

    checks = quietly(examine, arguments.json)
    healthy = all(check.status != "fail" for check in checks)
    if arguments.json:
        print(json.dumps({"ok": healthy, "checks": [asdict(check) for check in checks]}))
    else:
        print("\n".join(check.line() for check in checks))
        print(
            "\nThis machine is ready. Run `make finetune` to train nano."
            if healthy
            else '\nFix the checks marked "fail" first.'
        )
    return 0 if healthy else 1


def run_check(arguments: argparse.Namespace) -> int:
    """Run `qllava check`; return status 1 if an example would not be learned as written."""
    from qllava.training.data import Part
    from qllava.training.preview import Source, check_sources, reader_of, sources_of_recipe

    if bool(arguments.data) == bool(arguments.config):
        raise InputError("Give either the data to check or a recipe with --config, not both and not neither.")

    def run() -> Any:
        if arguments.config:
            return check_sources(*sources_of_recipe(arguments.config))
        reader = reader_of(arguments.model, arguments.tokenizer, arguments.template)

        def source(paths: list[Path]) -> list[Source]:
            return [Source([Part(p, arguments.image_folder) for p in paths], reader, arguments.max_length)]

        return check_sources(source(arguments.data), source([arguments.eval_file] if arguments.eval_file else []))

    verdict = quietly(run, arguments.json)
    print(json.dumps(verdict.as_json()) if arguments.json else verdict.text())
    return 0 if verdict.ok else 1


def run_inspect(arguments: argparse.Namespace) -> int:
    """Run `qllava inspect`: show the first examples as the model sees them: in the terminal, as a page, or as JSON."""
    from qllava.training.data import Part
    from qllava.training.preview import Source, inspect_examples, reader_of

    out = sys.stdout

    def run() -> None:
        reader = reader_of(arguments.model, arguments.tokenizer, arguments.template)
        source = Source([Part(arguments.data, arguments.image_folder)], reader, arguments.max_length)
        write = (lambda found: print(json.dumps(found), file=out)) if arguments.json else None
        rows = arguments.rows or (None if arguments.json else 8)
        inspect_examples(source, count=rows, page=arguments.html, write=write)

    quietly(run, arguments.json)
    return 0


def run_plan(arguments: argparse.Namespace) -> int:
    """Run `qllava plan`: print the peak memory by part; return status 1 if no setting fits."""
    from qllava.training.plan import as_json, as_text, plan

    found = quietly(
        lambda: plan(
            config=arguments.config,
            model=arguments.model,
            language_model=arguments.language_model,
            vision_tower=arguments.vision_tower,
            lora_r=arguments.lora_r,
            tokens_per_pack=arguments.tokens_per_pack,
            limit=arguments.fit,
            base_model=arguments.base_model,
        ),
        arguments.json,
    )
    print(json.dumps(as_json(found)) if arguments.json else as_text(found))
    return 1 if found.fits is False else 0
