"""Adapter -> a standalone LLaVA, verified.

    W = dequantize(NF4 base) + (alpha / r) B A          in fp32, cast once

Chosen: the delta goes onto the weights that training saw. Onto the original 16-bit weights it is another model (KL per
token 8e-3 against 2e-5 on a small trial), and rounding the sum to 4 bit again another still. The result is written
aside, loaded anew as any program would load it, and asked the run's own held-out rows beside the adapter model: it gets
its name only if they agree.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from qllava.config import InputError
from qllava.models.adapter import PROBES_FILE, load_adapter, load_run, read_record
from qllava.models.assemble import Recipe, assemble
from qllava.models.checkpoint import load_llava, save_llava, write_aside
from qllava.models.vision import one_line

# What rounding to 16 bit costs stays far below; a forgotten layer or a wrong scale lies far above. Onto the original
# weights the result is another model by design: there the figures are reported, not judged.
MAX_KL = 1e-3
# Where the adapter model prefers its token to the merged model's by less than this (nats), rounding decides: a tie.
TIE = 0.05
# Share of learned positions with the same token, or a tie.
MIN_AGREEMENT = 0.995


@dataclass(frozen=True)
class MergeResult:
    """What a merge came to."""

    base: str
    """`nf4` or `original`: the weights that the delta was added to."""
    kl_per_token: float | None
    """Mean KL divergence from the adapter model at learned positions, in nats; None when it was not measured."""
    top1_agreement: float | None
    """Share of learned positions where both find the same token likeliest."""
    verified: bool
    """Whether the result was loaded anew and agreed."""


def merge(run: Path, out: Path, *, base: str, dtype: str, max_shard_size: str, verify: bool) -> MergeResult:
    """Write the model of a run folder, or of one of its checkpoints, as one LLaVA in llava-hf's layout.

    Args:
        base: `nf4` for the weights that training saw, `original` for the 16-bit ones.
        dtype: of the result: bfloat16, float16 or float32.

    Raises InputError when the folder holds no adapter, its base is another one, `out` is not empty, or the result does
    not agree with the adapter model; nothing is written then.
    """
    record = read_record(run)
    if not (run / "adapter_config.json").is_file():
        raise InputError(
            f"{run} holds no adapter (a stage 1 has only a projector); give a run of finetune_lora or its checkpoint."
        )
    result = MergeResult(base, None, None, False)
    with write_aside(out) as aside:
        _write(run, record if base == "nf4" else _original(record), aside, getattr(torch, dtype), max_shard_size)
        if verify:
            found = compare(run, aside)
            held = found.agrees if base == "nf4" else math.isfinite(found.kl_per_token)
            result = MergeResult(base, found.kl_per_token, found.top1_agreement, held)
            if not held:
                raise InputError(
                    f"The merged model differs from what was trained (KL {found.kl_per_token:.2e} per token, the same "
                    f"token {found.top1_agreement:.1%} of the time, or a tie {found.same_or_tie:.1%}), so it was not "
                    "written; please report this with the ledger.txt."
                )
        (aside / "README.md").write_text(_card(run, result, dtype), encoding="utf-8")
    return result


def _original(record: Recipe) -> Recipe:
    """The same base in 16 bit, which has another fingerprint than the quantized one that the record names."""
    return replace(record, load_in_4bit=False, fingerprint="") if record.load_in_4bit else record


def _write(run: Path, base: Recipe, aside: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Load base and adapter, fold one into the other and save; nothing of it stays in memory."""
    assembled = assemble(base)
    merged = fold(load_adapter(assembled, run), dtype)
    try:
        save_llava(merged, assembled.processor, aside, max_shard_size=max_shard_size)
    except InputError as error:
        if not isinstance(error.__cause__, OSError | SafetensorError):
            raise
        raise error.__cause__ from error  # a full disk: `write_aside` says it with the name that the user gave


def fold(model: PeftModel, dtype: torch.dtype) -> Any:
    """Add every LoRA to its layer, dequantized, and return the bare LLaVA in one dtype, on the CPU.

    Changes the model in place.
    """
    bare = model.get_base_model()
    for name, module in list(bare.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            bare.set_submodule(name, _linear(module.base_layer, _delta(module), dtype))
        elif hasattr(module, "modules_to_save"):
            bare.set_submodule(name, module.modules_to_save["default"])
    for name, module in list(bare.named_modules()):
        if module.__class__.__name__ == "Linear4bit":  # a quantized layer that carries no LoRA
            bare.set_submodule(name, _linear(module, None, dtype))
    left = [name for name, _ in bare.named_parameters() if "lora_" in name or "base_layer" in name]
    if left:
        raise ValueError(f"not merged: {left[0]}")
    # transformers' own `to` refuses a model that was once quantized.
    return nn.Module.to(bare, device="cpu", dtype=dtype)


def _delta(layer: Any) -> torch.Tensor:
    """(alpha / r) B A of one layer, in fp32: shape (out, in)."""
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    delta: torch.Tensor = layer.scaling["default"] * (b @ a)
    return delta.detach()


def _linear(layer: Any, delta: torch.Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A plain linear layer with the layer's weights as training saw them, plus a delta: added in fp32, cast once.

    It is moved to the CPU at once: the card holds the packed weights, and may have no room for the whole ones.
    """
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    full = dequantize_4bit(weight.data, state).float() if state is not None else weight.detach().float()
    full = full.reshape(layer.out_features, layer.in_features)
    out = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    full = full if delta is None else full + delta
    out.weight = nn.Parameter(full.to(dtype).cpu(), requires_grad=False)
    if layer.bias is not None:
        out.bias = nn.Parameter(layer.bias.detach().to(dtype).cpu(), requires_grad=False)
    return out


def read_probes(run: Path) -> list[dict[str, torch.Tensor]]:
    """The held-out rows that a run kept: input_ids (S), labels (S), pixel_values (I, 3, H, W) where it has pictures."""
    path = run / PROBES_FILE if (run / PROBES_FILE).is_file() else run.parent / PROBES_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read ({one_line(error)}), so the merge cannot be verified; --no-verify merges without."
        ) from error
    rows: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        row, _, key = name.partition(".")
        rows.setdefault(row, {})[key] = tensor
    return list(rows.values())


@dataclass(frozen=True)
class Comparison:
    """Two models at the same learned positions."""

    kl_per_token: float
    """Mean KL divergence, in nats."""
    top1_agreement: float
    """Share of positions where both find the same token likeliest."""
    same_or_tie: float
    """The same, and where the first model prefers its own token by less than `TIE`."""

    @property
    def agrees(self) -> bool:
        """Whether no more than rounding lies between them."""
        return self.kl_per_token <= MAX_KL and self.same_or_tie >= MIN_AGREEMENT


def compare(run: Path, merged: Path) -> Comparison:
    """A merged folder against the adapter model, on the run's own probes.

    One model is in memory after the other. Both compute as they would serve: in fp32 on a CPU.
    """
    probes = read_probes(run)
    adapter, _ = load_run(run)
    expected = [
        log_probabilities(adapter, probe) for probe in tqdm(probes, desc="Asking the adapter model", leave=False)
    ]
    device = next(adapter.parameters()).device
    del adapter
    whole, _ = load_llava(str(merged), dtype=torch.float32 if device.type == "cpu" else "auto")
    whole.to(device)
    kl, lost = 0.0, []
    for probe, wanted in zip(tqdm(probes, desc="Asking the merged model", leave=False), expected, strict=True):
        found = log_probabilities(whole, probe)[:, : wanted.shape[1]]
        kl += float(F.kl_div(found, wanted, log_target=True, reduction="sum"))
        lost.append(lost_by_choice(wanted, found))
    preferred = torch.cat(lost)
    same, tied = preferred == 0, preferred < TIE
    return Comparison(max(kl, 0.0) / len(preferred), float(same.float().mean()), float(tied.float().mean()))


def lost_by_choice(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """(T,): how much less likely (nats) the first model finds the second's likeliest token than its own; 0: the same.

    wanted, found: (T, vocabulary) log-probabilities.
    """
    return wanted.max(-1).values - wanted.gather(-1, found.argmax(-1, keepdim=True))[:, 0]


@torch.no_grad()
def log_probabilities(model: Any, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """(learned positions, vocabulary): what the model expects where the row has something to learn; on the CPU."""
    device = next(model.parameters()).device
    inputs = {key: probe[key][None] if key == "input_ids" else probe[key] for key in probe if key != "labels"}
    logits = model(**{key: value.to(device) for key, value in inputs.items()}).logits[0, :-1]
    return F.log_softmax(logits[(probe["labels"][1:] != -100).to(device)].float(), dim=-1).cpu()


def _card(run: Path, result: MergeResult, dtype: str) -> str:
    """The model card of a merged folder."""
    record = read_record(run)
    results = run / "results.json"
    onto = "NF4 weights that training saw" if result.base == "nf4" and record.load_in_4bit else "original weights"
    base = record.model or f"{record.language_model} with the tower {record.vision_tower}"
    lines = [
        "---", "library_name: transformers", "pipeline_tag: image-text-to-text", "tags: [llava, qllava]", "---", "",
        f"# {run.name}", "",
        f"A LLaVA in {dtype}, tuned with qllava from {base} (template {record.template}).",
        f"The adapter was added to the {onto}.",
    ]  # fmt: skip
    if result.kl_per_token is not None:
        lines.append(
            f"Against the adapter model: KL {result.kl_per_token:.2e} per token, same first token "
            f"{result.top1_agreement:.2%}."
        )
    if results.is_file():
        lines += ["", "```json", json.dumps(json.loads(results.read_text(encoding="utf-8")), indent=2), "```"]
    return "\n".join([*lines, "", "The licences of the base model and of the data apply.", ""])
