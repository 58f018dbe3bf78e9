"""The ledger: number of parameters, type and number of trained parameters of each part of the model.

It is printed when a run starts, written to its folder, and checked: common mistakes (LoRA on the tower, a
quantized projector, a fully trained model) end a run before its first step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

PARTS = ("vision tower", "projector", "language model", "lm_head", "LoRA")


@dataclass
class Line:
    """One part of the model."""

    part: str
    """One of `PARTS`."""
    parameters: int = 0
    """Number of parameters; packed 4-bit weights are counted unpacked."""
    trainable: int = 0
    """Number of trained parameters."""
    dtypes: set[str] = field(default_factory=set)
    """Types of the parameters; nf4 for packed weights."""


def ledger(model: nn.Module) -> list[Line]:
    """Return one line for each part of a LLaVA; shared weights (a tied head) are counted once."""
    lines = {part: Line(part) for part in PARTS}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue  # peft keeps the projector it started from; it is not in use
        line = lines[_part(name)]
        packed = parameter.__class__.__name__ == "Params4bit"
        count = 2 * parameter.numel() if packed else parameter.numel()
        line.parameters += count
        line.trainable += count if parameter.requires_grad else 0
        line.dtypes.add("nf4" if packed else str(parameter.dtype).removeprefix("torch."))
    return [line for line in lines.values() if line.parameters]


def _part(name: str) -> str:
    if "lora_" in name:
        return "LoRA"
    for part, mark in (
        ("vision tower", "vision_tower"),
        ("projector", "multi_modal_projector"),
        ("lm_head", "lm_head"),
    ):
        if mark in name:
            return part
    return "language model"


def check(model: nn.Module) -> None:
    """Assert what a run relies on; see the module docstring.

    An AssertionError here is a bug of qllava, not an error of the user.
    """
    for name, parameter in model.named_parameters():
        part = _part(name)
        packed = parameter.__class__.__name__ == "Params4bit"
        if "lora_" in name:
            assert ".language_model." in name, f"LoRA outside the language model: {name}"
        if part != "language model":
            assert not packed, f"must not be quantized: {name}"
        if parameter.requires_grad:
            assert part in ("projector", "LoRA"), f"must not be trained: {name}"
            assert str(parameter.dtype) == "torch.float32", f"must be trained in fp32, not {parameter.dtype}: {name}"


def format_ledger(lines: list[Line], rates: dict[str, float]) -> str:
    """Format the ledger as a text table; `rates` holds the learning rate by part."""
    rows = [("part", "parameters", "type", "trained", "learning rate")]
    for line in lines:
        rate = f"{rates[line.part]:g}" if line.trainable and line.part in rates else "-"
        rows.append((line.part, f"{line.parameters:,}", "+".join(sorted(line.dtypes)), f"{line.trainable:,}", rate))
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])
