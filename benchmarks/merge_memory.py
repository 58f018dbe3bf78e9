"""Benchmark of peak memory and time of `qllava merge` at real sizes, with random weights in shards on disk.

    python benchmarks/merge_memory.py --folder DIR --out benchmarks/results/merge_memory.json      (about 10 GB of disk)

The base is written shard by shard, then LoRA, projector and 32 probes, as a run would leave them. The command runs in
its own process; the operating system counts the peak. The bound is two shards and 1.5 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from benchmarks.command import measured
from benchmarks.machine import provenance
from qllava.config import NANO_WEIGHTS
from qllava.models.adapter import save_record
from qllava.models.checkpoint import write_weights
from qllava.models.language import load_tokenizer
from qllava.models.lora import Lora
from qllava.models.outline import Recipe
from qllava.runs import ADAPTER_FILE, PROBES_FILE
from qllava.surroundings import prepare_process

RANK, PROBES, WORDS, PIXELS = 16, 32, 60, 224
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SHAPES: dict[str, dict[str, Any]] = {
    # TinyLlama-1.1B and Vicuna-7B.
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32},
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Figures of one merge."""

    shape: str
    """A key of SHAPES."""
    parameters: int
    """Parameters of the language model."""
    shard_gb: float
    """Size of a shard in GB."""
    peak_gb: float
    """Peak memory of the command in GB."""
    bound_gb: float
    """Largest peak that is allowed, in GB."""
    seconds: float
    """Seconds of the whole command."""
    kl_per_token: float
    """KL divergence that the command reports."""
    verified: bool
    """Whether the command verified the merged model."""


def make_base(folder: Path, shape: str, shard: str) -> tuple[Path, Path, int]:
    """Write a language model in bf16 and CLIP-L/14 in fp16, unless they exist.

    Returns:
        The folders of both, and the number of the language model's parameters.
    """
    language_model, tower = folder / "llama", folder / "tower"
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, dtype="bfloat16", **SHAPES[shape])
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in empty.state_dict().items()}
    if not (language_model / "config.json").is_file():
        language_model.mkdir(parents=True)
        write_weights(
            language_model,
            tensors,
            lambda name: (
                torch.ones(tensors[name].shape, dtype=torch.bfloat16)
                if "norm" in name
                else torch.empty(tensors[name].shape, dtype=torch.bfloat16).normal_(std=0.02)
            ),
            max_shard_size=shard,
        )
        AutoTokenizer.from_pretrained(NANO_WEIGHTS / "llama").save_pretrained(language_model)
        config.save_pretrained(language_model)
        CLIPVisionModel(CLIPVisionConfig(image_size=PIXELS, patch_size=14, **CLIP_L)).half().save_pretrained(tower)  # type: ignore[arg-type]
        CLIPImageProcessor(
            size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}
        ).save_pretrained(tower)
    return language_model, tower, sum(tensor.numel() for tensor in tensors.values())


def make_run(folder: Path, language_model: Path, tower: Path) -> Path:
    """Write what a run on this base would leave (adapter, record and probes), and return its folder."""
    run = folder / "run"
    run.mkdir(exist_ok=True)
    config = LlamaConfig.from_pretrained(language_model)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    prefix, tensors = "base_model.model.model", {}
    for name, module in empty.model.named_modules():
        if name.startswith("layers.") and isinstance(module, torch.nn.Linear):
            path = f"{prefix}.language_model.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, module.in_features) * 0.01
            tensors[f"{path}.lora_B.weight"] = torch.randn(module.out_features, RANK) * 0.01
    width = config.hidden_size
    for name, shape in (("linear_1", (width, CLIP_L["hidden_size"])), ("linear_2", (width, width))):
        tensors[f"{prefix}.multi_modal_projector.{name}.weight"] = torch.randn(shape) * 0.02
        tensors[f"{prefix}.multi_modal_projector.{name}.bias"] = torch.zeros(width)
    save_file(tensors, run / ADAPTER_FILE)
    Lora(RANK, 2 * RANK).peft_config().save_pretrained(run)
    save_record(
        Recipe(None, str(language_model), str(tower), "mlp2x_gelu", -2, "pad", "chatml", True, dtype="bfloat16"), run
    )
    tokenizer: Any = load_tokenizer(str(language_model))
    image = tokenizer.convert_tokens_to_ids("<image>")
    probes: dict[str, torch.Tensor] = {}
    for number in range(PROBES):
        words = torch.randint(10, 1000, (WORDS,))
        probes[f"{number}.input_ids"] = torch.cat([torch.full(((PIXELS // 14) ** 2,), image), words])
        probes[f"{number}.labels"] = torch.cat([torch.full(((PIXELS // 14) ** 2 + WORDS // 2,), -100), words[30:]])
        probes[f"{number}.pixel_values"] = torch.randn(1, 3, PIXELS, PIXELS)
    save_file(probes, run / PROBES_FILE)
    return run


def measure(shape: str, folder: Path, shard_gb: float) -> Measured:
    """Write a base and a run, merge them in another process, and return the figures."""
    torch.manual_seed(0)
    shard = f"{round(shard_gb * 1000)}MB"
    language_model, tower, parameters = make_base(folder / f"{shape}-{shard}", shape, shard)
    run = make_run(language_model.parent, language_model, tower)
    out = language_model.parent / f"merged-{os.getpid()}"
    took = measured(["merge", str(run), str(out), "--max-shard-size", shard, "--json"])
    said = json.loads(took.stdout)
    return Measured(
        shape, parameters, shard_gb, round(took.peak_bytes / 1e9, 2), round(2 * shard_gb + 1.5, 2),
        round(took.seconds, 1), said["kl_per_token"], said["verified"],
    )  # fmt: skip


def main() -> int:
    """Measure one shape; return 1 if the peak is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--shard-gb", type=float, default=0.5)
    parser.add_argument("--folder", type=Path, required=True, help="folder to write the weights to; they are kept")
    parser.add_argument("--out", type=Path, help="file to write the figures to, as JSON")
    arguments = parser.parse_args()
    found = measure(arguments.shape, arguments.folder, arguments.shard_gb)
    figures = {**asdict(found), **provenance("cpu")}
    print(json.dumps(figures, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return int(found.peak_gb > found.bound_gb)


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
