"""Memory of a run: its peak before it starts, and the settings that make it fit."""

from qllava.training.memory.fit import DoesNotFit, Plan, fit, plan_of, settled
from qllava.training.memory.phases import PHASES, Asking, phases_of
from qllava.training.memory.step import (
    CONTEXT,
    OPTIMS,
    PACK_SIZES,
    PARTS,
    Estimate,
    Setup,
    estimate,
    prepare,
    recompute,
    setup_of,
)
from qllava.training.options.sizes import CARDS, GB, format_bytes, parse_bytes

__all__ = [
    "CARDS",
    "CONTEXT",
    "GB",
    "OPTIMS",
    "PARTS",
    "PHASES",
    "PACK_SIZES",
    "Asking",
    "DoesNotFit",
    "Estimate",
    "Plan",
    "Setup",
    "estimate",
    "fit",
    "format_bytes",
    "parse_bytes",
    "phases_of",
    "plan_of",
    "prepare",
    "recompute",
    "settled",
    "setup_of",
]
