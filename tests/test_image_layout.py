"""How many tokens an image takes is decided in one place, and is what the models compute."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig, SiglipVisionConfig, SiglipVisionModel

from qllava.image_layout import ImageLayout

ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 34,
    "patch_size": 8,
}  # fmt: skip


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("family", [(CLIPVisionConfig, CLIPVisionModel), (SiglipVisionConfig, SiglipVisionModel)])
def test_is_what_the_tower_gives(family: Any, strategy: str) -> None:
    config_class, model_class = family
    vision = config_class(**SIZES)
    found = ImageLayout.of_config(LlavaConfig(vision_config=vision, vision_feature_select_strategy=strategy))
    with torch.device("meta"):
        states = model_class(vision)(torch.empty(1, 3, 34, 34), output_hidden_states=True).hidden_states[-1]
    assert (found.rows, found.columns, found.outputs) == (4, 4, states.shape[1])
    assert found.tokens == states[:, found.first :].shape[1] and found.strategy == strategy


def test_a_new_llava_reads_patches_alone() -> None:
    clip, siglip = (ImageLayout.of_tower(config(**SIZES)) for config in (CLIPVisionConfig, SiglipVisionConfig))
    assert (clip.tokens, clip.outputs, clip.first, clip.additional, clip.strategy) == (16, 17, 1, 1, "default")
    assert (siglip.tokens, siglip.outputs, siglip.first, siglip.additional, siglip.strategy) == (16, 16, 0, 0, "full")


def test_no_other_module_decides_what_is_left_out() -> None:
    """A second place that compares the strategy or the type of tower would be wrong for the next family of towers."""
    deciding = set()
    for path in (ROOT / "qllava").rglob("*.py"):
        compared = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Compare)]
        for text in map(ast.unparse, compared):
            if re.search(r"select_strategy (==|!=)|(==|!=) '(clip|siglip)_vision_model'|in CLASS_TOKEN", text):
                deciding.add(path.relative_to(ROOT).as_posix())
    # The second refuses what it cannot write, which has nothing to do with tokens.
    assert deciding == {"qllava/image_layout.py", "qllava/export/gguf.py"}
