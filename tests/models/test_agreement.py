"""A model folder whose parts disagree is refused in one sentence, by check, plan and run alike, before weights load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qllava import cli
from qllava.config import InputError
from qllava.inference import load
from qllava.models.layouts import WEIGHTS
from qllava.models.outline import Recipe, outline
from qllava.models.reading import read_model, read_parts
from qllava.training.plan import plan
from tests.tiny_models import make_tiny_parts, make_tiny_records
from tests.tiny_runs import refusal


def edit(file: str, **values: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file; `a__b` is the key b inside a, and `...` removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for key, value in values.items():
            *outer, own = key.split("__")
            part = content
            for name in outer:
                part = part[name]
            if value is ...:
                part.pop(own)
            else:
                part[own] = value
        (folder / file).write_text(json.dumps(content))

    return change


def tensors(**changes: Any) -> Callable[[Path], None]:
    """Replace tensors of the weights (by a shape), or remove them; names have `__` for dots."""

    def change(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        for key, shape in changes.items():
            name = key.replace("__", ".")
            held.pop(name, None)
            if shape is not ...:
                held[name] = torch.zeros(shape)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def text(file: str, content: str) -> Callable[[Path], None]:
    """Another content of a file."""
    return lambda folder: (folder / file).write_text(content) and None


def tokenizer_without_image(folder: Path) -> None:
    content = (folder / "tokenizer.json").read_text().replace("<image>", "<picture>")
    (folder / "tokenizer.json").write_text(content)
    config = (folder / "tokenizer_config.json").read_text().replace("<image>", "<picture>")
    (folder / "tokenizer_config.json").write_text(config)


def token_beyond_the_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzz"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(content))


@dataclass(frozen=True)
class Break:
    """One way in which a folder is broken, and what the sentence has to say: file, and both values."""

    change: Callable[[Path], None]
    says: tuple[str, ...]


C, P, G = "config.json", "processor_config.json", "generation_config.json"
LLM, HEAD = "language_model__model__", "language_model__lm_head__weight"
BREAKS = {
    "image token": Break(edit(C, image_token_index=7), (C, "image_token_index 7", "<image> as 3")),
    "image token beyond": Break(edit(C, image_token_index=9999), (C, "9999", "vocab_size of")),
    "no image token": Break(tokenizer_without_image, ("no token <image>", C, "3")),
    "token beyond": Break(token_beyond_the_vocabulary, ("tokenizer", "'zzz' with the id 5000", C, "vocab_size")),
    "fewer rows": Break(edit(C, text_config__vocab_size=300), ("300", C)),
    "more rows": Break(edit(C, text_config__vocab_size=900), (C, "vocab_size of 900", "embed_tokens")),
    "embedding": Break(tensors(**{f"{LLM}embed_tokens__weight": (12, 64)}), (C, "vocab_size of", "12 x 64")),
    "head": Break(tensors(**{HEAD: (12, 64)}), (C, "vocab_size of", "12 x 64", "lm_head")),
    "no head": Break(tensors(**{HEAD: ...}), ("lacks weights", "language_model.lm_head.weight")),
    "width": Break(edit(C, text_config__hidden_size=32), (C, "hidden_size of 32", "x 64")),
    "fewer layers": Break(edit(C, text_config__num_hidden_layers=1), (C, "1 layers in text_config", "layers.1.")),
    "more layers": Break(edit(C, text_config__num_hidden_layers=3), ("lacks weights", "layers.2.")),
    "fewer tower layers": Break(edit(C, vision_config__num_hidden_layers=2), (C, "2 layers in vision", "layers.2.")),
    "inner width": Break(edit(C, text_config__intermediate_size=96), (C, "(128, 64)", "(96, 64)")),
    "shared heads": Break(edit(C, text_config__num_key_value_heads=1), (C, "(32, 64)", "(16, 64)")),
    "heads by width": Break(
        edit(C, text_config__num_attention_heads=3, text_config__num_key_value_heads=3, text_config__head_dim=...),
        (C, "64", "3"),
    ),
    "heads by shared": Break(edit(C, text_config__num_key_value_heads=3), (C, "num_attention_heads 4", "3")),
    "tower heads": Break(edit(C, vision_config__num_attention_heads=3), (C, "32", "3")),
    "projector by tower": Break(tensors(multi_modal_projector__linear_1__weight=(64, 24)), (C, "(64, 24)", "(64, 32)")),
    "projector by model": Break(tensors(multi_modal_projector__linear_2__weight=(48, 64)), (C, "(48, 64)", "(64, 64)")),
    "projector missing": Break(
        tensors(multi_modal_projector__linear_2__bias=...), ("lacks weights", "multi_modal_projector.linear_2.bias")
    ),
    "patch size": Break(edit(P, patch_size=16), (P, "4 image tokens", "16 features")),
    "additional tokens": Break(edit(P, num_additional_image_tokens=0), (P, "15 image tokens", "16 features")),
    "select strategy": Break(edit(P, vision_feature_select_strategy="full"), (P, "17 image tokens", "16 features")),
    "strategy of nobody": Break(edit(C, vision_feature_select_strategy="cls"), (C, "cls")),
    "processor's image token": Break(edit(P, image_token="<|im_start|>"), (P, "<|im_start|>", "<image>")),
    "image size": Break(
        edit("preprocessor_config.json", crop_size={"height": 24, "width": 24}, size={"shortest_edge": 24}),
        ("preprocessor_config.json", "24 x 24", C, "32 x 32"),
    ),
    "mean": Break(edit("preprocessor_config.json", image_mean=[0.5]), ("preprocessor_config.json",)),
    "tower size": Break(edit(C, vision_config__image_size=64), (C, "64")),
    "patch over image": Break(edit(C, vision_config__patch_size=64), (C, "image_size 32", "patch_size 64")),
    "several layers": Break(edit(C, vision_feature_layer=[-2, -1]), ("[-2, -1]", "-2")),
    "layer beyond": Break(edit(C, vision_feature_layer=-9), ("vision_feature_layer is -9", "3 layers")),
    "layer 0": Break(edit(C, vision_feature_layer=0), ("vision_feature_layer is 0", "-4")),
    "pixels": Break(
        edit("preprocessor_config.json", image_std=[0, 0, 0]), ("preprocessor_config.json", "image_std must not be 0")
    ),
    "end of answer": Break(edit(G, eos_token_id=5000), (G, "eos_token_id 5000", C, "vocab_size")),
    "ends of answer": Break(edit(G, eos_token_id=[2, 5001]), (G, "5001", C, "vocab_size")),
    "suppressed": Break(edit(G, suppress_tokens=[5002]), (G, "suppress_tokens 5002")),
    "padding": Break(edit(C, text_config__pad_token_id=5003), (C, "5003")),
    "activation": Break(edit(C, text_config__hidden_act="nothing"), (C, "nothing")),
    "positions": Break(edit(C, text_config__rope_parameters={"rope_type": "odd", "rope_theta": 1.0}), (C,)),
    "no number": Break(edit(C, text_config__hidden_size="wide"), (C, "wide")),
    "negative": Break(edit(C, text_config__num_attention_heads=0), (C, "zero")),
    "no JSON": Break(text(C, "{"), (C,)),
    "generation no JSON": Break(text(G, "{"), (G,)),
    "processor no JSON": Break(text(P, "{"), ("processor",)),
    "tokenizer no JSON": Break(text("tokenizer.json", "{}"), ("processor",)),
    "a list": Break(text(C, "[]"), (C,)),
}  # fmt: skip


def recipe(folder: Path) -> Recipe:
    return Recipe(str(folder), None, None, "mlp2x_gelu", -2, "pad", "", False)


def said_by(read: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as error:
        read()
    return refusal(error.value)


@pytest.mark.parametrize("way", BREAKS)
def test_one_sentence_from_check_plan_and_run(
    way: str, hf_layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(hf_layout, folder)
    BREAKS[way].change(folder)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.LlavaForConditionalGeneration.from_pretrained", never)
    said = {
        "check": said_by(lambda: read_model(str(folder))),
        "plan": said_by(lambda: plan(model=str(folder))),
        "run": said_by(lambda: outline(recipe(folder))),
        "chat": said_by(lambda: load(str(folder))),
    }
    assert len(set(said.values())) == 1, said
    assert str(folder) in said["run"]
    for part in BREAKS[way].says:
        assert part in said["run"], (part, said["run"])


def test_a_model_that_is_quantized_already(hf_layout: Path, tmp_path: Path) -> None:
    """It may be asked, and not trained."""
    folder = tmp_path / "llava"
    shutil.copytree(hf_layout, folder)
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit(C, quantization_config=packed)(folder)
    said = {
        said_by(lambda: read_model(str(folder))),
        said_by(lambda: plan(model=str(folder))),
        said_by(lambda: outline(recipe(folder))),
    }
    assert len(said) == 1 and "is already quantized" in next(iter(said))
    # These weights are not packed, whatever config.json says.
    assert "the weights are not packed" in said_by(lambda: load(str(folder)))


def test_sound_folders_pass(hf_layout: Path) -> None:
    read_model(str(hf_layout))
    plan(model=str(hf_layout))
    outline(recipe(hf_layout))


def test_the_commands_end_with_status_1(hf_layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(hf_layout, folder)
    edit(G, eos_token_id=5000)(folder)
    rows = make_tiny_records(tmp_path)
    for line in (["check", str(rows), "--model", str(folder)], ["plan", "--model", str(folder)]):
        assert cli.main(line) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "eos_token_id 5000" in said


PARTS = {
    "another tokenizer": Break(token_beyond_the_vocabulary, ("'zzz' with the id 5000", C, "vocab_size")),
    "rows": Break(edit(C, vocab_size=900), (C, "vocab_size of 900", "embed_tokens")),
    "heads": Break(edit(C, num_key_value_heads=3), (C, "num_attention_heads 4", "num_key_value_heads 3")),
    "end of answer": Break(edit(G, eos_token_id=5000), (G, "eos_token_id 5000", C)),
    "no JSON": Break(text(C, "{"), (C,)),
}


@pytest.mark.parametrize("way", PARTS)
def test_a_language_model_too(way: str, tmp_path: Path) -> None:
    llm, tower = make_tiny_parts(tmp_path)
    PARTS[way].change(llm)
    said = {
        said_by(lambda: read_parts(str(llm), str(tower))),
        said_by(lambda: plan(language_model=str(llm), vision_tower=str(tower))),
        said_by(lambda: outline(Recipe(None, str(llm), str(tower), "mlp2x_gelu", -2, "pad", "chatml", False))),
    }
    assert len(said) == 1, said
    assert all(part in next(iter(said)) for part in PARTS[way].says), said


def test_a_layer_that_the_tower_does_not_have(tmp_path: Path) -> None:
    llm, tower = make_tiny_parts(tmp_path)
    said = said_by(lambda: outline(Recipe(None, str(llm), str(tower), "mlp2x_gelu", -9, "pad", "chatml", False)))
    assert "vision_feature_layer is -9" in said and "3 layers" in said
