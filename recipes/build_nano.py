"""Build nano's weights: a tower trained with open_clip on drawn images, and a LLaMA trained on text only.

    python recipes/build_nano.py --out weights
    python recipes/build_nano.py --out small --small

The two parts are trained in parallel, on one core each, and log to `tower.log` and `llama.log`. The same command
resumes a build that was stopped, and leaves a part alone that is finished. With a C++ compiler (for `torch.compile`)
both are trained faster.

`--small` builds a LLaMA with half of the layers instead, for ablations: nano's own without every second layer, trained
further on a few texts. `recipes/ablate.py` builds it when it first needs it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from qllava.arguments import Parser, carry_out, check_written_folder, file_path, looks
from qllava.config import NANO_WEIGHTS
from qllava.files import whole_folder
from qllava.surroundings import prepare_process

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def _save(model: PreTrainedModel, dtype: torch.dtype, out: Path) -> None:
    weights: torch.nn.Module = model  # the types of transformers' own `to` are incomplete
    weights.to(dtype)
    model.save_pretrained(out)


def build_tower(out: Path, seed: int) -> float:
    """Train the tower, write it in transformers' format, in fp16, and return the seconds it took.

    Raises:
        InputError: The build that was stopped here had other settings.
    """
    import torch
    from transformers import CLIPImageProcessor

    from qllava.models.vision import convert_open_clip
    from qllava.nano import kept, scenes, tower

    started = time.monotonic()
    torch.set_num_threads(1)
    log = kept.log_to(out / "tower.log", "tower")
    model = convert_open_clip(tower.train(seed=seed, log=log, kept=out / "tower.state").visual)
    processor = CLIPImageProcessor(
        size={"shortest_edge": scenes.SIZE},
        crop_size={"height": scenes.SIZE, "width": scenes.SIZE},
        image_mean=list(tower.MEAN),
        image_std=list(tower.STD),
    )
    with whole_folder(out / "tower", _is_written) as aside:
        processor.save_pretrained(aside)
        _save(model, torch.float16, aside)
    return _finished(out / "tower.state", started, log)


def build_llama(out: Path, seed: int) -> float:
    """Train tokenizer and LLaMA, write them, in bf16, and return the seconds it took.

    Raises:
        InputError: The build that was stopped here had other settings.
    """
    import torch

    from qllava.nano import kept, llama, texts

    started = time.monotonic()
    torch.set_num_threads(1)
    log = kept.log_to(out / "llama.log", "llama")
    tokenizer = texts.train_tokenizer()
    model = llama.train(tokenizer, seed=seed, log=log, kept=out / "llama.state")
    with whole_folder(out / "llama", _is_written) as aside:
        tokenizer.save_pretrained(aside)
        _save(model, torch.bfloat16, aside)
    return _finished(out / "llama.state", started, log)


def _finished(state: Path, started: float, log: Callable[[str], None]) -> float:
    """Remove the state of a part that is written; return the seconds of this start."""
    state.unlink(missing_ok=True)
    seconds = time.monotonic() - started
    log(f"written after {seconds / 60:.0f} minutes of this start, {time.process_time() / 60:.0f} of CPU time")
    return seconds


def build_small_llama(out: Path) -> None:
    """Halve nano's LLaMA, train the rest on text for a few steps, and write it, in bf16."""
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from qllava.nano import llama

    source = NANO_WEIGHTS / "llama"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    llama.shorten(model)
    model.train()
    llama.train_round(model, tokenizer, llama.SMALL_ROUND, random.Random("text-small"), print)
    _save(model, torch.bfloat16, out)
    tokenizer.save_pretrained(out)


def _is_written(part: Path) -> bool:
    """Whether an earlier start has finished a part."""
    return (part / "model.safetensors").is_file()


def command_line() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description="Make nano's weights again.")
    parser.add_argument("--out", type=file_path, required=True, help="folder to write `tower` and `llama` into")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, scenes and texts (default: 0)")
    parser.add_argument(
        "--small", action="store_true", help="build a LLaMA with half the layers of nano's, and no tower"
    )
    looks(parser, out=check_written_folder)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both parts in parallel, or the small LLaMA, and return the exit status."""
    prepare_process()
    return carry_out(command_line().parse_args(arguments), _run)


def _run(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if arguments.small:
        build_small_llama(out)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    missing = {}
    for name, part in (("tower", build_tower), ("llama", build_llama)):
        if _is_written(out / name):
            print(f"{out / name} is finished. Remove it to build it again.")
        else:
            missing[name] = part
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = {name: pool.submit(part, out, arguments.seed) for name, part in missing.items()}
        for name, future in futures.items():
            print(f"{name}: {future.result() / 60:.0f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
