"""The commands that use a trained model: merge, export, chat."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from qllava.arguments import (
    base_flag,
    check_file,
    check_finished,
    check_kept,
    check_run,
    check_written_folder,
    file_path,
    loading_flags,
    looks,
    model_name,
    sampling_flag,
    votes_flag,
)
from qllava.cli.flags import Verbs, add_verb, json_flag, model_argument, positive, quietly, temperature
from qllava.config import InputError


def add(verbs: Verbs) -> None:
    """Add the commands of this module."""
    _add_merge(verbs)
    _add_export(verbs)
    _add_chat(verbs)


def _add_merge(verbs: Verbs) -> None:
    merge = add_verb(
        verbs, "merge", run_merge, "merge a run's adapter into its base, write a standalone model, and verify it"
    )
    merge.add_argument(
        "folder", metavar="RUN", type=file_path, help="folder of a finished run or of one of its checkpoints"
    )
    merge.add_argument("out", metavar="OUT", type=file_path, help="folder to write the merged model into")
    merge.add_argument(
        "--base",
        choices=("nf4", "original"),
        default="nf4",
        help="add the adapter to the dequantized 4-bit weights, as in training (default), or to the original weights",
    )
    merge.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    merge.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="maximum size of one weight file (default: 5GB)"
    )
    merge.add_argument(
        "--no-verify", action="store_true", help="do not reload the merged model and compare it with the adapter model"
    )
    base_flag(merge)
    json_flag(merge)
    looks(merge, folder=check_run, out=check_written_folder)


def _add_export(verbs: Verbs) -> None:
    export = add_verb(verbs, "export", run_export, "write a merged model in the format of llama.cpp and Ollama")
    export.add_argument(
        "model", metavar="MODEL", type=model_name, help="folder of a merged model, or the hub name of a LLaVA"
    )
    export.add_argument("out", metavar="OUT", type=file_path, help="folder to write the files into")
    export.add_argument("--format", choices=("gguf",), required=True, help="gguf: llama.cpp, Ollama, LM Studio")
    export.add_argument("--quantize", choices=("f16", "bf16", "q8_0"), default="f16", help="(default: f16)")
    looks(export, out=check_written_folder, model=check_finished)


def _add_chat(verbs: Verbs) -> None:
    chat = add_verb(verbs, "chat", run_chat, "ask a model about images")
    model_argument(chat)
    chat.add_argument(
        "--image",
        metavar="FILE",
        type=file_path,
        nargs="+",
        action="extend",
        default=[],
        help="images to show with the first question",
    )
    chat.add_argument("--prompt", metavar="TEXT", help="ask this one question, print the answer, and exit")
    chat.add_argument("--load-in-4bit", action="store_true", help="load the language model in 4 bit (NF4)")
    loading_flags(chat)
    chat.add_argument("--max-new-tokens", metavar="N", type=positive, default=256, help="(default: 256)")
    chat.add_argument(
        "--temperature", metavar="T", type=temperature, help="sampling temperature; 0 is greedy decoding (default: 0)"
    )
    sampling_flag(chat, "--temperature")
    chat.add_argument("--seed", metavar="N", type=int, help="random seed for sampling")
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    chat.add_argument(
        "--compare",
        metavar="MODEL",
        type=model_name,
        help="second model: both answer each question, and you vote without seeing their names",
    )
    votes_flag(chat)
    looks(chat, image=check_file, votes=check_kept, model=check_finished, compare=check_finished)


def run_merge(arguments: argparse.Namespace) -> int:
    """Run `qllava merge`; return status 1 if the merged model does not match the adapter model."""
    from qllava.merge import merge

    verify = not arguments.no_verify
    result = quietly(
        lambda: merge(
            arguments.folder,
            arguments.out,
            base=arguments.base,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            verify=verify,
            base_model=arguments.base_model,
        ),
        arguments.json,
    )
    if arguments.json:
        print(json.dumps(asdict(result)))
    elif result.kl_per_token is None or result.top1_agreement is None:
        print(f"Wrote the merged model to {arguments.out}. It is not verified (--no-verify).")
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
    """Run `qllava export`: write the files and print their sizes."""
    from qllava.export.gguf import export

    for path in export(arguments.model, arguments.out, quantize=arguments.quantize):
        print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    print("How to serve them: docs/serving.md")
    return 0


def run_chat(arguments: argparse.Namespace) -> int:
    """Run `qllava chat`: answer one `--prompt`, hold a conversation, or compare two models."""
    if arguments.compare is not None and arguments.prompt is not None:
        raise InputError(
            "--compare cannot be used with --prompt, because it asks for votes. Remove --prompt and type the questions."
        )
    from qllava.cli.terminal import chat_loop, compare_loop
    from qllava.inference import Loading, Settings

    settings = Settings(arguments.system, arguments.temperature, arguments.max_new_tokens, arguments.seed)
    how = Loading(
        load_in_4bit=arguments.load_in_4bit,
        dtype=arguments.dtype,
        base_model=tuple(arguments.base_model),
        recommended_sampling=arguments.sampling == "recommended",
    )
    images = arguments.image
    if arguments.compare is None:
        return chat_loop(arguments.model, how, images=images, prompt=arguments.prompt, settings=settings)
    models = (arguments.model, arguments.compare)
    return compare_loop(models, how, images=images, votes=arguments.votes, settings=settings)
