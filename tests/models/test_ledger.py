"""The ledger counts what is there, and its check ends a run that would learn the wrong thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qllava.models.adapter import add_lora, train_projector_only
from qllava.models.assemble import Assembled, assemble
from qllava.models.ledger import Line, check, format_ledger, ledger
from qllava.models.lora import Lora
from tests.tiny_models import make_tiny_model, make_tiny_processor
from tests.tiny_runs import Tiny


@pytest.fixture
def assembled(tiny: Tiny) -> Assembled:
    return assemble(tiny.recipe())


def by_part(model: Any) -> dict[str, Line]:
    return {line.part: line for line in ledger(model)}


def test_counts_what_packed_weights_stand_for(assembled: Assembled) -> None:
    plain = by_part(make_tiny_model(make_tiny_processor()))
    lines = by_part(add_lora(assembled, Lora(4, 8)))
    assert list(lines) == ["vision tower", "projector", "language model", "lm_head", "LoRA"]
    for part in ("vision tower", "projector", "language model", "lm_head"):
        assert lines[part].parameters == plain[part].parameters, part
    assert lines["language model"].dtypes == {"nf4", "float32"}
    assert lines["projector"].dtypes == lines["LoRA"].dtypes == {"float32"}
    assert {part: line.trainable for part, line in lines.items() if line.trainable} == {
        "projector": lines["projector"].parameters,
        "LoRA": lines["LoRA"].parameters,
    }


def test_a_tied_head_counts_once() -> None:
    model = make_tiny_model(make_tiny_processor())
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    assert "lm_head" not in by_part(model)


def test_both_stages_pass(tiny: Tiny, assembled: Assembled) -> None:
    check(train_projector_only(assembled))
    check(add_lora(assemble(tiny.recipe()), Lora(4, 8)))


def test_lora_by_leaf_name_is_found(assembled: Assembled) -> None:
    """CLIP has a q_proj too."""
    model = get_peft_model(assembled.model, LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="LoRA outside the language model: .*vision_tower"):
        check(model)


@pytest.mark.parametrize("part", ["vision_tower", "lm_head", "language_model.norm", "embed_tokens"])
def test_what_must_not_train_is_found(assembled: Assembled, part: str) -> None:
    model = train_projector_only(assembled)
    next(p for name, p in model.named_parameters() if part in name).requires_grad_(True)
    with pytest.raises(AssertionError, match="must not be trained"):
        check(model)


def test_masters_in_half_precision_are_found(assembled: Assembled) -> None:
    model = train_projector_only(assembled)
    model.model.multi_modal_projector.to(torch.bfloat16)
    with pytest.raises(AssertionError, match="must be trained in fp32, not torch.bfloat16"):
        check(model)


def test_a_quantized_projector_is_found(assembled: Assembled) -> None:
    packed = assembled.model.model.language_model.layers[0].mlp.up_proj
    assembled.model.model.multi_modal_projector.linear_1 = packed
    with pytest.raises(AssertionError, match="must not be quantized: .*multi_modal_projector"):
        check(assembled.model)


def test_table(tiny: Tiny) -> None:
    text = format_ledger(
        [Line("projector", 1234, 1234, {"float32"}), Line("lm_head", 5, 0, {"bfloat16"})], {"projector": 2e-5}
    )
    head, _, projector, rest = text.splitlines()
    assert head.split() == ["part", "parameters", "type", "trained", "learning", "rate"]
    assert projector.split() == ["projector", "1,234", "float32", "1,234", "2e-05"]
    assert rest.split() == ["lm_head", "5", "bfloat16", "0", "-"]


def test_is_written_into_the_run(tiny: Tiny) -> None:
    text = Path(tiny.stage2 / "ledger.txt").read_text(encoding="utf-8")
    assert "language model" in text and "nf4" in text and "2e-05" in text and "0.0002" in text
    assert "samples 8 (dropped 0, trimmed 0); template chatml" in text
