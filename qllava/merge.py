"""Merge of an adapter into a standalone LLaVA, with verification.

    W = dequantize(NF4 base) + (alpha / r) B A          unpacked and added in fp32, cast once

The delta is added to the weights that training saw. Added to the original 16-bit weights it gives a different model (KL
per token 8e-3 against 2e-5 on a small trial), and rounding the sum to 4 bit again gives a third one. The result is
written under a temporary name, read back, and compared with the adapter model on the run's own held-out samples: it is
renamed to its final name only if they agree.

A whole language model is never in memory: weights are read one by one and written in shards, and both compared models
are computed layer by layer (`models/stream.py`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from qllava.config import InputError
from qllava.models.adapter import read_record
from qllava.models.bases import at_its_base, located
from qllava.models.card import base_of, results_of, write_card
from qllava.models.checkpoint import load_config, names_on_disk, write_aside, write_settings, write_weights
from qllava.models.delta import Delta
from qllava.models.errors import one_line
from qllava.models.nf4 import as_quantized
from qllava.models.outline import Outline, Recipe, outline
from qllava.models.stream import Adapted, Source, Stored, hidden_states
from qllava.models.weights import EMBEDDING, HEAD, open_weights
from qllava.runs import LEDGER_FILE, MERGE_FILE, PROBES_FILE, RECORD_FILE, Run

# Maximum KL per token in nats. Rounding to 16 bit is far below it; a missing layer or a wrong scale is far above. With
# the original weights the result is a different model by design: there the figures are reported, not judged.
MAX_KL = 1e-3
# If the adapter model prefers its token to the merged model's by less than this (nats), rounding decides: a tie.
TIE = 0.05
# Minimum share of learned positions with the same token, or a tie.
MIN_AGREEMENT = 0.995
_TOWER_FILE = ".tower.safetensors"
# Number of positions whose logits are in memory at once.
_PIECE = 64


@dataclass(frozen=True)
class MergeResult:
    """Result of a merge."""

    base: str
    """`nf4` or `original`: the weights that the delta was added to."""
    kl_per_token: float | None
    """Mean KL divergence from the adapter model at learned positions, in nats; None if it was not measured."""
    top1_agreement: float | None
    """Share of learned positions with the same most likely token."""
    same_text: float | None
    """Share of held-out samples with the same greedy answer, as far as `Comparison` follows it."""
    verified: bool
    """Whether the result was read back and agrees with the trained model."""


@dataclass(frozen=True)
class Accounting:
    """Names of all tensors, as in the merged folder, by what the merge did with them."""

    merged: list[str]
    """Tensors to which a delta was added."""
    copied: list[str]
    """Tensors copied from the base, possibly with another type."""
    replaced: list[str]
    """Tensors replaced by trained ones: the projector."""
    left_out: list[str]
    """Tensors in the base's files that are not part of a LLaVA."""


def merge(
    run: Path, out: Path, *, base: str, dtype: str, max_shard_size: str, verify: bool, base_model: Sequence[str] = ()
) -> MergeResult:
    """Write the model of a run folder, or of one of its checkpoints, as one LLaVA in llava-hf's layout.

    Args:
        run: Folder of the run or checkpoint.
        out: Folder of the result.
        base: `nf4` for the weights that training saw, `original` for the 16-bit ones.
        dtype: Type of the result: bfloat16, float16 or float32.
        max_shard_size: Maximum size of one weight file, such as 5GB.
        verify: Whether to compare the result with the adapter model.
        base_model: New locations of the base's parts, if they have moved.

    Raises:
        InputError: The folder has no adapter, its base is a different model, `out` is not empty, the disk is too full,
            or the result does not agree with the adapter model; nothing is written.
    """
    run = run.resolve()
    record = _record(run, base_model)
    four_bit = record.load_in_4bit
    result = MergeResult(base, None, None, None, False)
    with write_aside(out) as aside:
        probes = read_probes(run) if verify else []
        with at_its_base(run):
            plan = outline(record)
        delta = Delta(run)
        delta.check(names_on_disk(plan.model), projector=record.model is None)
        plan.base.spill(aside / _TOWER_FILE)
        plan.tower = None
        accounting = _write(plan, delta, aside, getattr(torch, dtype), max_shard_size, four_bit and base == "nf4")
        if verify:
            models = plan.model, _read_anew(aside, plan)
            found = compare(models, sources(plan, delta, aside, four_bit=four_bit), probes)
            result = MergeResult(base, found.kl_per_token, found.top1_agreement, found.same_text, found.agrees)
            # With weights that training did not see, the result is a different model; its distance is reported.
            another = base == "original" and four_bit and math.isfinite(found.kl_per_token)
            if not (found.agrees or another):
                raise InputError(
                    f"The merged model differs from the adapter model (KL {found.kl_per_token:.2e} per token, the same "
                    f"token {found.top1_agreement:.1%} of the time, or a tie {found.same_or_tie:.1%}), so it was not "
                    f"written; {_what_helps(dtype)}"
                )
        kept = {
            **asdict(result),
            "run": run.name,
            "base_model": base_of(record),
            "template": record.template,
            "identity": plan.recipe.fingerprint,
            "dtype": dtype,
            "results": results_of(run),
            "tensors": asdict(accounting),
        }
        (aside / MERGE_FILE).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        (aside / _TOWER_FILE).unlink(missing_ok=True)
        write_card(aside, run, plan.recipe, "transformers", _told(record, result, accounting, dtype))
    return result


def _record(run: Path, base_model: Sequence[str]) -> Recipe:
    """Return what the model of a run or checkpoint was built from, or raise InputError if it has no adapter."""
    if not run.is_dir():
        raise InputError(f"The folder {run} does not exist. Give a finetune_lora run or one of its checkpoints.")
    record = run / RECORD_FILE
    if Run(run).kind == "merged" or ((run / "config.json").is_file() and not record.is_file()):
        raise InputError(f"{run} is already a merged model. Use it directly, or give the run that it was merged from.")
    if said := Run(run).without_model:
        raise InputError(said)
    read_record(run)
    if not Run(run).has_adapter:
        raise InputError(f"{run} has no adapter. Give a finetune_lora run or one of its checkpoints.")
    return located(run, base_model)


def _write(
    plan: Outline, delta: Delta, aside: Path, dtype: torch.dtype, max_shard_size: str, four_bit: bool
) -> Accounting:
    """Write weights and settings, with at most one shard in memory."""
    shapes = {name: tensor.to(dtype) for name, tensor in names_on_disk(plan.model).items()}
    tied = _tied(plan)
    if tied:
        del shapes[HEAD]
    need, free = sum(tensor.nbytes for tensor in shapes.values()), shutil.disk_usage(aside).free
    if need > free:
        raise InputError(
            f"The merged model needs {need / 1e9:.1f} GB, but {aside.parent} has only {free / 1e9:.1f} GB free. "
            "Free disk space or give another folder."
        )
    packed = quantized_weights(plan.model) if four_bit else set()
    device = computing_device()
    merged = {f"{layer}.weight": layer for layer in delta.layers}
    with tqdm(total=len(shapes), desc="Merging", unit="tensor", leave=False) as bar:

        def read(name: str) -> Tensor:
            bar.update()
            if name in delta.replaced:
                return delta[name].to(dtype)
            tensor = plan.base[name]
            if name in packed:
                tensor = as_quantized(tensor.to(device)).cpu()
            if name in merged:
                tensor = tensor.float() + delta.of(merged[name])
            return tensor.to(dtype)

        write_weights(aside, shapes, read, max_shard_size=max_shard_size)
    write_settings(aside, plan.model, plan.processor, dtype=dtype, tied=tied)
    return Accounting(
        merged=sorted(merged),
        copied=sorted(set(shapes) - set(merged) - set(delta.replaced)),
        replaced=delta.replaced,
        left_out=sorted(set(plan.base) - set(shapes)),
    )


def _tied(plan: Outline) -> bool:
    """Return whether head and embedding are the same weight; the config alone does not decide, but the weights."""
    config: Any = plan.model.config
    if not config.text_config.tie_word_embeddings:
        return False
    return HEAD not in plan.base or torch.equal(plan.base[HEAD], plan.base[EMBEDDING])


def _read_anew(folder: Path, plan: Outline) -> Any:
    """Return the model of the written config, without weights; raise InputError if its prompts would differ."""
    config, processor = load_config(str(folder))
    for what, wrote, read in (
        ("vocabulary", plan.processor.tokenizer.get_vocab(), processor.tokenizer.get_vocab()),
        ("chat template", plan.processor.chat_template, processor.chat_template),
    ):
        if wrote != read:
            raise InputError(
                f"The {what} of the merged model changed when it was read back, so the model was not written."
            )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config).eval()


def quantized_weights(model: Any) -> set[str]:
    """Return the names of weights that training had in NF4: the linear layers of the language model's decoder."""
    layers = model.model.language_model.layers
    return {
        f"language_model.model.layers.{path}.weight"
        for path, module in layers.named_modules()
        if isinstance(module, nn.Linear)
    }


def read_probes(run: Path) -> list[dict[str, Tensor]]:
    """Return the held-out samples that a run saved: input_ids (S), labels (S), pixel_values (I, 3, H, W)."""
    path = run / PROBES_FILE if (run / PROBES_FILE).is_file() else run.parent / PROBES_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read ({one_line(error)}), so the merge cannot be verified. "
            "To merge without verification, use --no-verify."
        ) from error
    rows: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        row, _, key = name.partition(".")
        rows.setdefault(row, {})[key] = tensor
    return list(rows.values())


@dataclass(frozen=True)
class Comparison:
    """Comparison of two models at the same learned positions."""

    kl_per_token: float
    """Mean KL divergence, in nats."""
    top1_agreement: float
    """Share of positions with the same most likely token."""
    same_or_tie: float
    """Share of positions with the same token, or where the first model prefers its own token by less than `TIE`."""
    same_text: float
    """Share of samples with the same greedy answer, compared until it differs from the reference answer."""

    @property
    def agrees(self) -> bool:
        """Whether the models differ only by rounding."""
        return self.kl_per_token <= MAX_KL and self.same_or_tie >= MIN_AGREEMENT


def computing_device() -> torch.device:
    """Return the GPU if available, as in training: block scales packed on CPU and CUDA differ in 0.2 % of the codes."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def sources(plan: Outline, delta: Delta, merged: Path, *, four_bit: bool) -> tuple[Adapted, Stored]:
    """Return the weights of the base with adapter, and of a merged folder, on the GPU if available.

    Both compute in fp32, so that rounding to 16 bit in each is not counted as a difference.
    """
    device = computing_device()
    adapted = Adapted(plan.base, delta, torch.float32, device, four_bit=four_bit)
    return adapted, Stored(open_weights(str(merged)), torch.float32, device)


def compare(models: tuple[Any, Any], sources: tuple[Source, Source], probes: Sequence[dict[str, Tensor]]) -> Comparison:
    """Compare two models on the same samples, one after the other.

    Args:
        models: Both models, without weights.
        sources: Sources of the weights of each.
        probes: Samples, from `read_probes`.
    """
    titles = ("Running the adapter model", "Running the merged model")
    asked = zip(models, sources, titles, strict=True)
    states = [hidden_states(model, source, probes, title) for model, source, title in asked]
    heads = [
        source.filled("language_model.lm_head", model.lm_head) for model, source in zip(models, sources, strict=True)
    ]
    labels = [probe["labels"][1:][probe["labels"][1:] != -100] for probe in probes]
    # A learned token after one that is not learned begins another answer.
    firsts = [_first_answer(probe["labels"][1:] != -100) for probe in probes]
    divergence, lost, same_text = 0.0, [], []
    for wanted, found, truth, first in zip(*states, labels, firsts, strict=True):
        likeliest = []
        for one, other in _log_probabilities(heads, (wanted, found)):
            divergence += float(F.kl_div(other, one, log_target=True, reduction="sum"))
            lost.append(lost_by_choice(one, other))
            likeliest.append(torch.stack([one.argmax(-1), other.argmax(-1)]))
        one, other = torch.cat(likeliest, dim=1)[:, :first]
        same_text.append(_same_text(one, other, truth[:first]))
    preferred = torch.cat(lost)
    same, tied = preferred == 0, preferred < TIE
    return Comparison(
        kl_per_token=max(divergence, 0.0) / len(preferred),
        top1_agreement=float(same.float().mean()),
        same_or_tie=float(tied.float().mean()),
        same_text=sum(same_text) / len(same_text),
    )


@torch.no_grad()
def _log_probabilities(
    heads: Sequence[Callable[[Tensor], Tensor]], states: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield log-probabilities of two models for states (T, D), (at most _PIECE, vocabulary) at a time, on the CPU."""
    for pieces in zip(*(state.split(_PIECE) for state in states), strict=True):
        one, other = (F.log_softmax(head(x).float(), dim=-1).cpu() for head, x in zip(heads, pieces, strict=True))
        yield one, other


def lost_by_choice(wanted: Tensor, found: Tensor) -> Tensor:
    """Return how much less likely, in nats, the first model finds the second's choice of a token than its own.

    Args:
        wanted: (T, vocabulary) log-probabilities of the first model.
        found: (T, vocabulary) log-probabilities of the second model.

    Returns:
        (T,) differences; 0 where both choose the same token.
    """
    return wanted.max(-1).values - wanted.gather(-1, found.argmax(-1, keepdim=True))[:, 0]


def _first_answer(learned: Tensor) -> int:
    """Return the number of tokens of a sample's first answer; `learned` (S,) marks the learned tokens."""
    begun = learned[int(learned.int().argmax()) :]
    return len(begun) if begun.all() else int(begun.int().argmin())


def _same_text(wanted: Tensor, found: Tensor, truth: Tensor) -> bool:
    """Return whether two greedy answers, (T,) each, are equal up to the first token that differs from the reference."""
    left = (wanted != truth).nonzero()
    known = int(left[0]) + 1 if len(left) else len(truth)
    return torch.equal(wanted[:known], found[:known])


def _what_helps(dtype: str) -> str:
    """Return the advice for a refused merge: rounding may be as large as the changes of a short run."""
    report = f"please report this bug with the {LEDGER_FILE}."
    return report if dtype == "float32" else f"use --dtype float32, which avoids rounding, or {report}"


def _told(record: Recipe, result: MergeResult, accounting: Accounting, dtype: str) -> list[str]:
    """Return the paragraphs of the model card about the merge."""
    onto = "NF4 weights that training saw" if result.base == "nf4" and record.load_in_4bit else "original weights"
    told = [
        f"A LLaVA in {dtype}, tuned with qllava. The adapter was added to the {onto}: {len(accounting.merged)} tensors "
        f"merged, {len(accounting.replaced)} replaced, {len(accounting.copied)} copied (`{MERGE_FILE}` names each)."
    ]
    if result.kl_per_token is not None and not result.verified:
        told.append("**It is not the model that was trained, and results below are not its own.**")
    if result.kl_per_token is not None:
        told.append(
            f"Against the adapter model, on samples that the run kept: KL {result.kl_per_token:.2e} per token, same "
            f"token {result.top1_agreement:.2%}, same greedy answer {result.same_text:.1%}."
        )
    return told
