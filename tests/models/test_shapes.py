"""One reading of a model's config files: a plan counts the model that a run builds, whatever it is built from."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, CLIPVisionConfig, LlamaConfig

from qllava.config import InputError, ModelConfig
from qllava.models.assemble import assemble
from qllava.models.outline import outline
from qllava.models.record import Recipe, read_record
from qllava.models.shapes import Shapes, read_shapes, shapes_of
from tests.tiny_runs import Tiny

ROOT = Path(__file__).resolve().parents[2]
# What loading adds, and what says where a config came from.
_NOT_SHAPES = ("dtype", "_name_or_path", "architectures", "transformers_version", "quantization_config")


def plain(config: Any) -> dict[str, Any]:
    """Everything that a config says about sizes and functions."""
    values: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else config
    return {
        key: plain(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _NOT_SHAPES
    }


def models(tiny: Tiny, hf_layout: Path) -> dict[str, ModelConfig]:
    """Settings that name a model in each of the ways there are."""
    parts: dict[str, Any] = {"language_model": str(tiny.language_model), "vision_tower": str(tiny.tower)}
    return {
        "parts": ModelConfig(**parts, load_in_4bit=False),
        "other choices": ModelConfig(**parts, projector_type="linear", vision_feature_layer=-1, load_in_4bit=False),
        "llava": ModelConfig(str(hf_layout), load_in_4bit=False),
        "nano": ModelConfig("nano", load_in_4bit=False),
    }


@pytest.mark.parametrize("which", ["parts", "other choices", "llava", "nano"])
def test_what_is_planned_is_what_is_built(which: str, tiny: Tiny, hf_layout: Path) -> None:
    model = models(tiny, hf_layout)[which]
    planned, recipe = plain(shapes_of(model).config), Recipe.of_settings(model)
    assert planned == plain(read_shapes(recipe).config)
    assert planned == plain(outline(recipe).model.config)
    assert planned == plain(assemble(recipe).model.config)


def test_a_run_is_planned_as_its_base(tiny: Tiny) -> None:
    planned = shapes_of(ModelConfig(str(tiny.stage2)))
    assert plain(planned.config) == plain(outline(read_record(tiny.stage2)).model.config)


def test_image_tokens_come_where_the_tokenizer_has_them(tiny: Tiny, tmp_path: Path) -> None:
    """A table with rows to spare does not grow: a plan that assumes one row for each token counts another model."""
    text = AutoConfig.from_pretrained(tiny.language_model)
    text.vocab_size += 300
    text.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny.language_model)
    tokenizer.save_pretrained(tmp_path)
    model = ModelConfig(language_model=str(tmp_path), vision_tower=str(tiny.tower))
    found = shapes_of(model)
    assert found.config.image_token_index == tokenizer.convert_tokens_to_ids("<image>")
    assert found.rows == text.vocab_size


def test_the_config_of_a_part_is_not_changed() -> None:
    text = LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=64, num_attention_heads=4)
    found = Shapes.of_parts(text, CLIPVisionConfig(), None, layer=-2, projector_type="linear")
    assert (text.vocab_size, found.rows, found.config.image_token_index) == (1000, 1024, 1000)
    assert found.config.projector_hidden_act == "linear" and found.positions == text.max_position_embeddings


def test_no_other_module_describes_a_llava() -> None:
    """A second place that fills in a LlavaConfig would be a second model as soon as one of the two is changed."""
    makers = set()
    for path in (ROOT / "qllava").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        if any(ast.unparse(call.func).endswith("LlavaConfig") for call in calls):
            makers.add(path.relative_to(ROOT).as_posix())
    assert makers == {"qllava/models/shapes.py"}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (ModelConfig("somewhere", language_model="x"), "not both"),
        (ModelConfig(language_model="x"), "needs both"),
        (ModelConfig(vision_tower="x"), "needs both"),
    ],
)
def test_settings_that_name_no_model(model: ModelConfig, said: str) -> None:
    with pytest.raises(InputError, match=said):
        shapes_of(model)
