"""Build nano's weights: a tower trained with open_clip on drawn images, and a LLaMA trained on text only.

    python recipes/build_nano.py --out qllava/nano/weights
    python recipes/build_nano.py --out small --small

The two parts are trained in parallel, on one core each. On two otherwise idle cores with bf16 matrix units it takes
about an hour and a half; a C++ compiler (for `torch.compile`) halves the LLaMA's time, without one it is not compiled.

`--small` builds a LLaMA with half of the layers instead, for ablations: nano's own without every second layer, trained
further on a few texts. `recipes/ablate.py` builds it when it first needs it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from qllava.arguments import Parser, carry_out, check_written_folder, file_path, looks
from qllava.config import NANO_WEIGHTS
from qllava.surroundings import prepare_process

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def _save(model: PreTrainedModel, dtype: torch.dtype, out: Path) -> None:
    weights: torch.nn.Module = model  # the types of transformers' own `to` are incomplete
    weights.to(dtype)
    model.save_pretrained(out)


def build_tower(out: Path) -> float:
    """Train the tower, write it in transformers' format, in fp16, and return the seconds it took."""
    import torch
    from transformers import CLIPImageProcessor

    from qllava.models.vision import convert_open_clip
    from qllava.nano import scenes, tower

    started = time.monotonic()
    torch.set_num_threads(1)
    model = convert_open_clip(tower.train().visual)
    _save(model, torch.float16, out)
    CLIPImageProcessor(
        size={"shortest_edge": scenes.SIZE},
        crop_size={"height": scenes.SIZE, "width": scenes.SIZE},
        image_mean=list(tower.MEAN),
        image_std=list(tower.STD),
    ).save_pretrained(out)
    return time.monotonic() - started


def build_llama(out: Path) -> float:
    """Train tokenizer and LLaMA, write them, in bf16, and return the seconds it took."""
    import torch

    from qllava.nano import llama

    started = time.monotonic()
    torch.set_num_threads(1)
    tokenizer = llama.train_tokenizer()
    model = llama.train(tokenizer)
    _save(model, torch.bfloat16, out)
    tokenizer.save_pretrained(out)
    return time.monotonic() - started


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


def command_line() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description="Make nano's weights again.")
    parser.add_argument("--out", type=file_path, required=True, help="folder to write `tower` and `llama` into")
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
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = {"tower": pool.submit(build_tower, out / "tower"), "llama": pool.submit(build_llama, out / "llama")}
        for name, future in parts.items():
            print(f"{name}: {future.result() / 60:.0f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
