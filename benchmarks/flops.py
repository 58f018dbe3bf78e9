"""Count of a training step's FLOPs at real model sizes, without weights.

    python benchmarks/flops.py --json benchmarks/results/flops.json

The real code runs on fake tensors, which have shapes and no contents: 13B parameters take no memory, and torch's
counter sees every product, forward, recomputed and backward. The table has TRL with and without recomputation, and
qllava with one and three samples per image, with and without recomputation, and with each single shortcut switched off.
A sample has an image of 576 tokens and 200 tokens of text, 100 of them learned.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlavaConfig
from trl.kernels import ChunkedLogProbFunction

from benchmarks import shapes
from benchmarks.counting import counter
from benchmarks.machine import provenance
from benchmarks.tables import format_table
from benchmarks.whole_head import compute_whole_head
from qllava.data.collate import pack_tensors
from qllava.data.encode import IGNORE_INDEX
from qllava.data.packing import Pack, lay_out
from qllava.image_layout import ImageLayout
from qllava.models.lora import Lora
from qllava.surroundings import prepare_process
from qllava.training.memory import recompute as recompute_layers
from qllava.training.memory.fake import fake_llava, llava_of
from qllava.training.step.attention import looking_at
from qllava.training.step.exact import take_shortcuts, teach_packs

TEXT_TOKENS, LEARNED_TOKENS = 200, 100


@dataclass(frozen=True)
class Shortcuts:
    """Work that qllava skips; see `training.exact`."""

    share: bool = True
    stop_tower: bool = True
    prune_last_layer: bool = True
    lora_first: bool = True
    head_on_learned: bool = True


def trl_step(
    config: LlavaConfig,
    *,
    samples: int = 1,
    text: int = TEXT_TOKENS,
    learned: int | None = LEARNED_TOKENS,
    recompute: bool = True,
    lora_r: int = 64,
) -> int:
    """Return the FLOPs of a step of TRL's trainer over a batch of samples of one length.

    Args:
        config: Config of the model.
        samples: Samples in the batch, each with one image.
        text: Tokens of text of a sample.
        learned: Positions of a sample that go through the head: the learned ones, as on CUDA; None: all, as on a CPU.
        recompute: Whether layers are recomputed in the backward pass.
        lora_r: Rank of LoRA.
    """
    with FakeTensorMode():
        model = fake_llava(config, load_in_4bit=True, dtype=torch.float32, lora=Lora(lora_r, lora_r))
        llava = llava_of(model)
        # As SFTTrainer prepares a model: with gradients of the inputs, the frozen tower is in the graph and recomputed.
        model.train()
        if recompute:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        image = ImageLayout.of_config(config).tokens
        # transformers compares the numbers of image tokens and features here; fake tensors have no values to count.
        llava.model.get_placeholder_mask = lambda ids, *_, **__: (ids == config.image_token_index).unsqueeze(-1)
        side = getattr(config.vision_config, "image_size", 0)
        ids = torch.zeros(samples, image + text, dtype=torch.long)
        pixels = torch.zeros(samples, 3, side, side)
        with counter() as counted:
            hidden = llava.model(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state[:, :-1]
            picked = hidden[:, -(learned or hidden.shape[1]) :].reshape(-1, hidden.shape[-1])
            targets = torch.zeros(len(picked), dtype=torch.long)
            log_probs, *_ = ChunkedLogProbFunction.apply(
                picked, llava.lm_head.weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy", "is_top1")
            )
            (-log_probs.sum()).backward()
        return int(counted.get_total_flops())


def qllava_step(
    config: LlavaConfig,
    *,
    samples: int = 1,
    text: int = TEXT_TOKENS,
    learned: int = LEARNED_TOKENS,
    recompute: bool = False,
    shortcuts: Shortcuts = Shortcuts(),
    lora_r: int = 64,
) -> int:
    """Return the FLOPs of a step of qllava over one image and all samples about it."""
    pack = _pack(config, samples, text, learned, share=shortcuts.share)
    return count_pack(config, pack, recompute=recompute, shortcuts=shortcuts, lora_r=lora_r)


def count_pack(config: LlavaConfig, pack: Pack, *, recompute: bool, shortcuts: Shortcuts, lora_r: int) -> int:
    """Return the FLOPs of a pack, forward and backward."""
    with FakeTensorMode() as fake:
        model = fake_llava(config, load_in_4bit=True, dtype=torch.float32, lora=Lora(lora_r, lora_r))
        llava = llava_of(model)
        teach_packs(llava)
        take_shortcuts(llava, shortcuts)
        if not shortcuts.head_on_learned:
            compute_whole_head(llava)
        model.train()
        if recompute:
            recompute_layers(llava.model.language_model, None)
        side = getattr(config.vision_config, "image_size", 0)
        tensors = {
            name: fake.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in pack_tensors(pack).items()
        }
        pixels = torch.zeros(len(pack.images), 3, side, side)
        with counter() as counted, looking_at(llava.model.language_model):
            (-model(**tensors, pixel_values=pixels).log_probs.sum()).backward()
        return int(counted.get_total_flops())


def _pack(config: LlavaConfig, samples: int, text: int, learned: int, *, share: bool) -> Pack:
    """Return a pack of samples about one image: the image, then a different question and answer in each."""
    image = [config.image_token_index] * ImageLayout.of_config(config).tokens
    asked = [IGNORE_INDEX] * (len(image) + text - learned)
    packs = [
        {
            "id": str(n),
            "input_ids": image + [n + 1] * text,
            "labels": asked + [n + 1] * learned,
            "image_files": ["a"],
            "image_tokens": [len(image)],
        }
        for n in range(samples)
    ]
    return lay_out(packs, config.image_token_index, share=share)


LINES: list[tuple[str, Callable[[LlavaConfig], int], int]] = [
    ("TRL, defaults", lambda config: trl_step(config), 1),
    ("TRL, defaults, head on all positions", lambda config: trl_step(config, learned=None), 1),
    ("TRL, no recomputation", lambda config: trl_step(config, recompute=False), 1),
    *(
        (
            f"qllava, {samples} per image{', recomputation' * recompute}{f', without {off}' * bool(off)}",
            lambda config, samples=samples, recompute=recompute, off=off: qllava_step(
                config,
                samples=samples,
                recompute=recompute,
                shortcuts=Shortcuts(**({off: False} if off else {})),
            ),
            samples,
        )
        for samples in (1, 3)
        for recompute in (False, True)
        for off in ("", *Shortcuts.__dataclass_fields__)
        if not (off == "share" and samples == 1) and not (off == "lora_first" and not recompute)
    ),
]
"""Steps to count: the name, the function that counts the FLOPs, and the number of samples in the step."""


def table(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return all lines of the table for these shapes."""
    found = []
    for name in names:
        for line, count, samples in LINES:
            config = getattr(shapes, name)()
            found.append({"shape": name, "step": line, "tflop_per_sample": count(config) / samples / 1e12})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Count the FLOPs, and print and write them."""
    parser = argparse.ArgumentParser(description="Count the FLOPs of a training step without weights.")
    parser.add_argument("--shape", nargs="+", default=["llava_7b", "llava_13b"], help="names of functions of shapes.py")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to check that the command runs")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args(arguments)
    found = table(["tiny"] if given.tiny else given.shape)
    print(format_table(found))
    if given.json:
        about = provenance("cpu")
        given.json.write_text(json.dumps([{**line, **about} for line in found], indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
