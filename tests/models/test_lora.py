"""LoRA as a value: what settings and adapters say, what peft makes of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import LlavaForConditionalGeneration

from benchmarks import shapes
from qllava.config import InputError, ModelConfig
from qllava.models.adapter import add_lora, continue_adapter
from qllava.models.assemble import assemble
from qllava.models.delta import Delta
from qllava.models.lora import Lora, Variant
from qllava.training.memory import Setup, estimate
from qllava.training.settings import parse
from tests.tiny_runs import Tiny

LORAS = [Lora(4, 8), Lora(16, 8, 0.1), Lora(4, 8, variant="rslora")]


@pytest.mark.parametrize("lora", LORAS)
def test_an_adapter_is_read_as_it_was_written(lora: Lora, tmp_path: Path) -> None:
    """A release of peft whose own defaults would be refused here fails with the name of the new key."""
    lora.peft_config().save_pretrained(tmp_path)
    assert Lora.of_folder(tmp_path) == lora


def test_of_settings() -> None:
    assert Lora.of_settings(ModelConfig(lora_r=16, lora_alpha=4, lora_dropout=0.5)) == Lora(16, 4, 0.5)


def test_of_a_run_and_of_its_model(tiny: Tiny) -> None:
    lora = Lora(4, 8, 0.1)
    assert Lora.of_folder(tiny.stage2) == Delta(tiny.stage2).lora == lora
    assembled = assemble(tiny.recipe())
    assert Lora.of_model(assembled.model) is None
    adapted = add_lora(assembled, lora)
    assert Lora.of_model(adapted) == Lora.of_model(assembled.model) == lora


FOREIGN = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "all",
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "modules_to_save": ["multi_modal_projector", "lm_head"],
    "fan_in_fan_out": True,
    "layer_replication": [[0, 1]],
    "target_parameters": ["mlp.weight"],
    "trainable_token_indices": [1],
    "init_lora_weights": "pissa",
    "peft_type": "IA3",
    "of_a_later_peft": {"kind": 2},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_would_be_taken_for_plain_lora_is_refused(name: str, tmp_path: Path) -> None:
    Lora(4, 8).peft_config().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: FOREIGN[name]}))
    (tmp_path / "qllava.json").write_text(
        '{"model": null, "language_model": "l", "vision_tower": "t", "projector_type": "mlp2x_gelu", '
        '"vision_feature_layer": -2, "image_aspect": "pad", "template": "chatml", "load_in_4bit": true}'
    )
    line = ["--model_name_or_path", str(tmp_path)]
    for read in (
        lambda: Lora.of_folder(tmp_path),
        lambda: Delta(tmp_path),  # merging
        lambda: parse(line, output_dir="x", nano={}, elsewhere=True),  # training it on
    ):
        with pytest.raises(InputError) as refused:
            read()
        said = str(refused.value)
        assert f"has {name} " in said and str(tmp_path) in said and said.endswith("give the merged model.")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"r": 0, "lora_alpha": 8}', '{"r": 4, "lora_alpha": "much"}'])
def test_a_config_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=r"cannot be loaded \(adapter_config\.json: "):
        Lora.of_folder(tmp_path)


def test_another_kind_is_not_trained_on_as_this_one(tiny: Tiny, tmp_path: Path) -> None:
    Lora(4, 8, variant="rslora").peft_config().save_pretrained(tmp_path)
    model = add_lora(assemble(tiny.recipe()), Lora(4, 8))
    with pytest.raises(InputError, match="of the kind rslora, and runs train only lora. Merge the"):
        continue_adapter(model, tmp_path)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_what_is_added_to_a_weight_is_what_peft_adds(variant: Variant) -> None:
    lora = Lora(4, 12, variant=variant)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), lora.peft_config(["0"], projector=False))
    layer: Any = model.base_model.model[0]  # type: ignore[index]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    found = lora.delta(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    torch.testing.assert_close(found, layer.get_delta_weight("default"))


def test_parameters_are_those_that_a_plan_counts_and_a_model_has() -> None:
    lora = Lora(8, 8)
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(shapes.tiny())
    counted = lora.parameters(model)
    setup = Setup(shapes.tiny(), lora, torch.float32, device="cpu", tokens_per_pack=64)
    assert estimate(setup).resident["LoRA"] == 4 * counted  # in fp32
    with torch.device("meta"):
        adapted = get_peft_model(model, lora.peft_config())
    assert counted == sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name) > 0
