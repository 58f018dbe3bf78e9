"""Sizes of towers without their weights are those of the towers that are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch

from benchmarks import shapes
from qllava.config import InputError
from qllava.models.towers import KINDS, kind_of, tower_config
from qllava.models.vision import convert_open_clip, load_tower
from tests.tiny_runs import Tiny


def test_llava_15() -> None:
    found = tower_config("open_clip:ViT-L-14-336-quickgelu/openai").to_dict()
    assert found == shapes.llava_7b().vision_config.to_dict()  # type: ignore[union-attr]


def test_siglip() -> None:
    own = tower_config("open_clip:ViT-SO400M-14-SigLIP-384/webli")
    sizes = (own.hidden_size, own.intermediate_size, own.num_hidden_layers, own.num_attention_heads)
    assert sizes == (1152, 4304, 27, 16)  # as the paper's authors published so400m
    assert (own.image_size, own.patch_size, own.hidden_act) == (384, 14, "gelu")


@pytest.mark.parametrize("arch", ["ViT-B-32", "ViT-S-32-alt"])
def test_those_of_open_clip_are_those_of_the_tower_itself(arch: str) -> None:
    with torch.random.fork_rng(devices=[]):
        built = convert_open_clip(open_clip.create_model(arch).visual).config
    assert tower_config(f"open_clip:{arch}/any").to_dict() == built.to_dict()


def test_those_of_a_folder_are_those_of_its_tower(tiny: Tiny) -> None:
    assert kind_of(tiny.tower) in KINDS
    built = load_tower(str(tiny.tower), weights=False).model.config.to_dict()
    found = tower_config(str(tiny.tower)).to_dict()
    loaded = {"dtype": None, "_name_or_path": ""}
    assert {**found, **loaded} == {**built, **loaded}


def test_what_is_no_tower_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="could not read"):
        tower_config("open_clip:local-dir:nowhere")
    with pytest.raises(InputError, match="no architecture 'ViT-Z'"):
        tower_config("open_clip:ViT-Z/x")
    for spec in ("open_clip:RN50/openai", "open_clip:coca_ViT-B-32/x"):  # the second pools its tokens by attention
        with pytest.raises(InputError, match="cannot be used as a vision tower"):
            tower_config(spec)
    with pytest.raises(InputError, match="neither a folder nor"):
        tower_config("somewhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="of type 'llama'"):
        tower_config(str(tmp_path))
