"""A model that is computed layer by layer is the model that transformers and peft compute whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qllava.merge import read_probes
from qllava.models.adapter import load_run, read_record
from qllava.models.checkpoint import load_llava
from qllava.models.delta import Delta
from qllava.models.outline import outline
from qllava.models.stream import Adapted, Stored, hidden_states
from qllava.models.weights import open_weights
from qllava.training.run import finetune
from tests.tiny_models import make_tiny_llava
from tests.tiny_runs import Tiny, stage2_settings

CPU = torch.device("cpu")


def whole(model: Any, probe: dict[str, Tensor]) -> Tensor:
    """Logits that predict learned tokens, from the model as everyone calls it."""
    inputs = {key: probe[key][None] if key == "input_ids" else probe[key] for key in probe if key != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits[0, :-1]
    found: Tensor = logits[probe["labels"][1:] != -100]
    return found


@pytest.mark.parametrize("four_bit", [True, False], ids=["4 bit", "whole"])
def test_base_and_adapter(tiny: Tiny, tmp_path: Path, four_bit: bool) -> None:
    chosen = stage2_settings(tiny, tmp_path / "run", load_in_4bit=four_bit, learning_rate=2e-2, projector_lr=1e-2)
    run = finetune(chosen)
    plan, delta, probes = outline(read_record(run)), Delta(run), read_probes(run)
    source = Adapted(plan.base, delta, torch.float32, CPU, four_bit=four_bit)
    head = source.filled("language_model.lm_head", plan.model.lm_head)
    model, _ = load_run(run)
    assert len(probes) == 8 and any("pixel_values" in probe for probe in probes)
    for states, probe in zip(hidden_states(plan.model, source, probes, ""), probes, strict=True):
        torch.testing.assert_close(head(states), whole(model, probe), rtol=1e-5, atol=1e-5)
    assert all(parameter.is_meta for parameter in plan.model.parameters())


def test_a_folder(tiny: Tiny, tmp_path: Path) -> None:
    folder = str(make_tiny_llava(tmp_path))
    plan = outline(tiny.recipe(model=folder, language_model=None, vision_tower=None))
    model, _ = load_llava(folder, dtype=torch.float32)
    source = Stored(open_weights(folder), torch.float32, CPU)
    probes = read_probes(tiny.stage2)
    head = source.filled("language_model.lm_head", plan.model.lm_head)
    for states, probe in zip(hidden_states(plan.model, source, probes, ""), probes, strict=True):
        torch.testing.assert_close(head(states), whole(model, probe), rtol=1e-5, atol=1e-5)
