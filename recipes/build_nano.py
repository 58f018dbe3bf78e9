"""Make nano's weights again: a tower trained with open_clip on drawn pictures, and a LLaMA trained on text alone.

    python recipes/build_nano.py --out qllava/nano/weights

The two parts train side by side, a core each. On two cores with bf16 matrix units it takes about an hour and a half
when nothing else runs; a C++ compiler (for `torch.compile`) halves the LLaMA's time, without one it trains uncompiled.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, PreTrainedModel

from qllava.models.vision import convert_open_clip
from qllava.nano import llama, scenes, tower


def _save(model: PreTrainedModel, dtype: torch.dtype, out: Path) -> None:
    weights: torch.nn.Module = model  # transformers' own `to` says nothing of its types
    weights.to(dtype)
    model.save_pretrained(out)


def build_tower(out: Path) -> float:
    """Train the tower and write it in transformers' format, in fp16. Returns the seconds it took."""
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
    """Train tokenizer and LLaMA and write them, in bf16. Returns the seconds it took."""
    started = time.monotonic()
    torch.set_num_threads(1)
    tokenizer = llama.train_tokenizer()
    model = llama.train(tokenizer)
    _save(model, torch.bfloat16, out)
    tokenizer.save_pretrained(out)
    return time.monotonic() - started


def command_line() -> argparse.ArgumentParser:
    """What the recipe understands."""
    parser = argparse.ArgumentParser(description="Make nano's weights again.")
    parser.add_argument("--out", type=Path, required=True, help="a folder; `tower` and `llama` are written into it")
    return parser


def main() -> int:
    """Train both parts side by side."""
    out: Path = command_line().parse_args().out
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = {"tower": pool.submit(build_tower, out / "tower"), "llama": pool.submit(build_llama, out / "llama")}
        for name, future in parts.items():
            print(f"{name}: {future.result() / 60:.0f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
