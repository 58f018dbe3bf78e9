"""Helpers of the tests of export: reading GGUF files with the gguf package, tensor names, and altered models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

HEADS, KV_HEADS, HEAD = 4, 2, 16  # of the tiny language model
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


def language_names(layers: int = 2) -> dict[str, str]:
    """Return, for each tensor of the language model, its name in the model folder by its name in GGUF."""
    names = {
        "token_embd.weight": "language_model.model.embed_tokens.weight",
        "output.weight": "language_model.lm_head.weight",
        "output_norm.weight": "language_model.model.norm.weight",
    }
    for n in range(layers):
        names |= {f"blk.{n}.{k}.weight": f"language_model.model.layers.{n}.{v}.weight" for k, v in LAYER.items()}
    return names


def tower_names(blocks: int) -> dict[str, str]:
    """Return the same for the tensors of vision tower and projector."""
    tower = "vision_tower.vision_model"
    names = {"v.patch_embd.weight": f"{tower}.embeddings.patch_embedding.weight"}
    for part in ("weight", "bias"):
        names[f"v.pre_ln.{part}"] = f"{tower}.pre_layrnorm.{part}"
        names[f"mm.0.{part}"] = f"multi_modal_projector.linear_1.{part}"
        names[f"mm.2.{part}"] = f"multi_modal_projector.linear_2.{part}"
        for n in range(blocks):
            names |= {f"v.blk.{n}.{k}.{part}": f"{tower}.encoder.layers.{n}.{v}.{part}" for k, v in BLOCK.items()}
    return names


# The class token and the positions, which the export writes as sums.
POSITIONS = {"v.class_embd", "v.patch_embd.bias", "v.position_embd.weight"}


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Kind], dict[str, Any]]:
    """Return the values in fp32 and the type of each tensor, and the header."""
    reader = GGUFReader(path)
    assert len({t.name for t in reader.tensors}) == len(reader.tensors)
    values = {}
    for t in reader.tensors:
        shape = [int(n) for n in reversed(t.shape)]
        values[t.name] = torch.from_numpy(dequantize(t.data, t.tensor_type).astype(np.float32)).reshape(shape)
    header = {name: field.contents() for name, field in reader.fields.items()}
    return values, {t.name: t.tensor_type for t in reader.tensors}, header


def pair(folder: Path) -> tuple[Path, Path]:
    language = [p for p in folder.glob("*.gguf") if not p.name.startswith("mmproj-")]
    projector = list(folder.glob("mmproj-*.gguf"))
    assert len(language) == len(projector) == 1
    return language[0], projector[0]


def as_transformers(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return rows of q and k in the order of transformers.

    GGUF's rows 2 i and 2 i + 1 of a head are rows i and HEAD / 2 + i there.
    """
    if ".attn_q." not in name and ".attn_k." not in name or name.startswith("v."):
        return values
    heads = HEADS if ".attn_q." in name else KV_HEADS
    rows = torch.empty_like(values)
    for head in range(heads):
        for i in range(HEAD // 2):
            rows[head * HEAD + i] = values[head * HEAD + 2 * i]
            rows[head * HEAD + HEAD // 2 + i] = values[head * HEAD + 2 * i + 1]
    return rows


def altered(folder: Path, out: Path, changes: dict[str, Any], **tensors_: torch.Tensor) -> Path:
    """Copy a model with other values in config.json ("text_config.hidden_act": ...) and other tensors; return `out`."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    for path, value in changes.items():
        *outer, last = path.split(".")
        place = config
        for name in outer:
            place = place[name]
        place[last] = value
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if tensors_:
        save_file(load_file(out / "model.safetensors") | tensors_, out / "model.safetensors", metadata={"format": "pt"})
    return out
