"""Benchmark of the quality loss of each way to serve a run: KL per token from the trained model.

    python benchmarks/serving_loss.py runs/finetune_lora --out benchmarks/results/serving_loss.json

On the run's probes (held-out examples), the trained model (base and adapter) is compared with

    merged              `qllava merge`, bf16: the delta added to the NF4 weights that training used
    merged_original     `qllava merge --base original`, bf16: the delta added to the 16-bit weights
    merged_nf4_again    the merged model with its language model in NF4, as `--load-in-4bit` serves it
    merged_q8_0         the merged model with its language model in Q8_0, as `qllava export --quantize q8_0` writes it
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from benchmarks.machine import provenance
from benchmarks.tables import format_table
from qllava.merge import compare, merge, quantized_weights, read_probes, sources
from qllava.models.adapter import read_record
from qllava.models.delta import Delta
from qllava.models.nf4 import as_quantized
from qllava.models.outline import outline
from qllava.models.stream import Stored
from qllava.models.weights import TABLES
from qllava.surroundings import prepare_process


class Rounded(Mapping[str, Tensor]):
    """Weights of which some are converted to a format and back."""

    def __init__(self, weights: Mapping[str, Tensor], names: set[str], through: Callable[[Tensor], Tensor]) -> None:
        self.weights, self.names, self.through = weights, names, through

    def __getitem__(self, name: str) -> Tensor:
        return self.through(self.weights[name]) if name in self.names else self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights


def q8_0(weight: Tensor) -> Tensor:
    """Convert a weight to Q8_0 and back, to fp32."""
    packed = quants.quantize(weight.float().numpy(), GGMLQuantizationType.Q8_0)
    return torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.Q8_0)).reshape(weight.shape)


def measure(run: Path, folder: Path) -> list[dict[str, Any]]:
    """Merge a run in both ways into a folder, and return a line with the comparison for each way of serving."""
    record = read_record(run)
    plan, delta, probes = outline(record), Delta(run), read_probes(run)
    for base in ("nf4", "original"):
        merge(run, folder / base, base=base, dtype="bfloat16", max_shard_size="5GB", verify=False)
    trained, merged = sources(plan, delta, folder / "nf4", four_bit=record.load_in_4bit)
    _, original = sources(plan, delta, folder / "original", four_bit=record.load_in_4bit)
    names = quantized_weights(plan.model)
    ways = {
        "merged": merged,
        "merged_original": original,
        "merged_nf4_again": Stored(Rounded(merged.weights, names, as_quantized), merged.dtype, merged.device),
        # With the embedding, which a GGUF file quantizes too.
        "merged_q8_0": Stored(Rounded(merged.weights, names | set(TABLES), q8_0), merged.dtype, merged.device),
    }
    lines = []
    for way, source in ways.items():
        found = compare((plan.model, plan.model), (trained, source), probes)
        lines.append(
            {
                "way": way,
                "kl_per_token": found.kl_per_token,
                "same_token": found.top1_agreement,
                "same_greedy_answer": found.same_text,
            }
        )
    return lines


def main() -> int:
    """Measure, print a table and, with --out, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of finetune_lora")
    parser.add_argument("--out", type=Path, help="file to write the figures to, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(arguments.run, Path(folder))
    print(format_table(lines))
    if arguments.out:
        figures = {**provenance("cuda" if torch.cuda.is_available() else "cpu"), "ways": lines}
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
