"""The GGUF pair, read back by the gguf package: every tensor once and equal, the header as the config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qllava.export import tensors
from qllava.export.gguf import export
from qllava.merge import merge
from qllava.models.weights import Weights, open_weights
from tests.export.gguf_files import (
    HEAD,
    HEADS,
    KV_HEADS,
    POSITIONS,
    altered,
    as_transformers,
    language_names,
    pair,
    read,
    tower_names,
)
from tests.tiny_models import make_tiny_model, make_tiny_processor, save_llava
from tests.tiny_runs import Tiny


@pytest.fixture(scope="module")
def exported(hf_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "f16"
    files = export(str(hf_layout), out)
    assert sorted(files) == sorted(out.iterdir()) and len(files) == 3
    return out


class TestTensors:
    @pytest.mark.parametrize(
        ("quantize", "kind", "dtype"), [("f16", Kind.F16, torch.float16), ("bf16", Kind.BF16, torch.bfloat16)]
    )
    def test_every_one_is_there_and_equal(
        self, hf_layout: Path, tmp_path: Path, quantize: str, kind: Kind, dtype: torch.dtype
    ) -> None:
        export(str(hf_layout), tmp_path / "out", quantize=quantize)
        original = load_file(hf_layout / "model.safetensors")
        for path, names in zip(pair(tmp_path / "out"), (language_names(), tower_names(blocks=2)), strict=True):
            assert quantize in path.name
            values, kinds, _ = read(path)
            assert values.keys() - POSITIONS == names.keys()
            for name, source in names.items():
                wanted = original[source]
                kept = Kind.F32 if wanted.ndim == 1 else Kind.F16 if name == "v.patch_embd.weight" else kind
                assert kinds[name] == kept, name
                rounded = wanted.to({Kind.F32: torch.float32, Kind.F16: torch.float16}.get(kept, dtype)).float()
                assert torch.equal(as_transformers(name, values[name]), rounded), name

    def test_positions_do_not_depend_on_where_the_class_token_stands(self, hf_layout: Path, exported: Path) -> None:
        """What llama.cpp adds up, with the class token first and last: each time what transformers does."""
        values, kinds, _ = read(pair(exported)[1])
        assert {kinds[name] for name in POSITIONS} == {Kind.F32}
        original = load_file(hf_layout / "model.safetensors")
        prefix = "vision_tower.vision_model.embeddings"
        position = original[f"{prefix}.position_embedding.weight"]
        patches = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))  # from the convolution
        wanted = torch.cat([original[f"{prefix}.class_embedding"][None], patches]) + position
        token, moved = values["v.class_embd"][None], patches + values["v.patch_embd.bias"]
        first = torch.cat([token, moved]) + values["v.position_embd.weight"]
        last = torch.cat([moved, token]) + values["v.position_embd.weight"]
        torch.testing.assert_close(first, wanted)
        torch.testing.assert_close(last, wanted.roll(-1, 0))

    def test_in_8_bit(self, hf_layout: Path, tmp_path: Path) -> None:
        export(str(hf_layout), tmp_path / "out", quantize="q8_0")
        language, projector = pair(tmp_path / "out")
        assert (language.name, projector.name) == ("tiny-q8_0.gguf", "mmproj-tiny-f16.gguf")
        original = load_file(hf_layout / "model.safetensors")
        values, kinds, header = read(language)
        assert header["general.file_type"] == 7
        for name, source in language_names().items():
            wanted, found = original[source], as_transformers(name, values[name])
            if wanted.ndim == 1:
                assert kinds[name] == Kind.F32 and torch.equal(found, wanted)
                continue
            assert kinds[name] == Kind.Q8_0
            step = wanted.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            # Half a step, and what rounding the step itself to f16 moves the largest by.
            assert ((found - wanted).reshape(-1, 32).abs() <= 0.56 * step).all(), name
            assert not torch.equal(found, wanted)
        assert {Kind.F32, Kind.F16} == set(read(projector)[1].values())

    def test_rows_that_32_does_not_divide_stay_in_16_bit(self, hf_layout: Path) -> None:
        weights = open_weights(str(hf_layout))
        row = tensors._copied(weights, "x", "language_model.model.layers.0.mlp.down_proj.weight", Kind.Q8_0)
        conv = "vision_tower.vision_model.embeddings.patch_embedding.weight"  # rows of 8
        assert row.kind == Kind.Q8_0 and tensors._copied(weights, "x", conv, Kind.Q8_0).kind == Kind.F16

    @pytest.mark.parametrize(("layer", "blocks"), [(-1, 3), (-2, 2), (-3, 1), (1, 1), (3, 3)])
    def test_blocks_after_the_features_are_left_out(
        self, hf_layout: Path, tmp_path: Path, layer: int, blocks: int
    ) -> None:
        source = altered(hf_layout, tmp_path / "model", {"vision_feature_layer": layer})
        export(str(source), tmp_path / "out")
        values, _, header = read(pair(tmp_path / "out")[1])
        assert values.keys() - POSITIONS == tower_names(blocks).keys()
        assert header["clip.vision.block_count"] == blocks
        assert header["clip.vision.feature_layer"] == [blocks]

    def test_a_tied_head_is_left_out(self, tmp_path: Path) -> None:
        processor = make_tiny_processor()
        model = make_tiny_model(processor)
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
        save_llava(model, processor, tmp_path / "model")
        export(str(tmp_path / "model"), tmp_path / "out")
        values = read(pair(tmp_path / "out")[0])[0]
        assert values.keys() == language_names().keys() - {"output.weight"}

    def test_shards(self, hf_layout: Path, exported: Path, tmp_path: Path) -> None:
        processor = make_tiny_processor()
        save_llava(make_tiny_model(processor), processor, tmp_path / "tiny", max_shard_size=100_000)
        assert len(list((tmp_path / "tiny").glob("*.safetensors"))) > 2
        export(str(tmp_path / "tiny"), tmp_path / "out")
        for one, other in zip(pair(tmp_path / "out"), pair(exported), strict=True):
            assert one.read_bytes() == other.read_bytes()

    def test_one_is_in_memory_after_the_other(
        self, hf_layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[str] = []
        read_one, write_one = Weights.__getitem__, GGUFWriter.write_tensor_data

        def reading(self: Weights, name: str) -> torch.Tensor:
            events.append("read")
            return read_one(self, name)

        def writing(self: GGUFWriter, *args: Any) -> None:
            events.append("write")
            write_one(self, *args)

        monkeypatch.setattr(Weights, "__getitem__", reading)
        monkeypatch.setattr(GGUFWriter, "write_tensor_data", writing)
        export(str(hf_layout), tmp_path / "out")
        assert events.count("write") == len(language_names()) + len(tower_names(2)) + len(POSITIONS)
        most = max(len(reads) for reads in "".join(event[0] for event in events).split("w"))
        assert most == 2  # the class token and its position, for one sum


def test_what_merge_wrote(tiny: Tiny, tmp_path: Path) -> None:
    merge(tiny.stage2, tmp_path / "merged", base="nf4", dtype="bfloat16", max_shard_size="5GB", verify=False)
    export(str(tmp_path / "merged"), tmp_path / "out", quantize="bf16")
    original = load_file(tmp_path / "merged" / "model.safetensors")
    values = [read(path)[0] for path in pair(tmp_path / "out")]
    for found, names in zip(values, (language_names(), tower_names(2)), strict=True):
        for name, source in names.items():
            exact = name != "v.patch_embd.weight"  # which is in f16
            wanted = original[source].float()
            torch.testing.assert_close(
                as_transformers(name, found[name]), wanted, atol=0 if exact else 1e-6, rtol=0 if exact else 1e-3
            )


class TestProjector:
    @pytest.mark.parametrize("approximate", ["none", "tanh"])
    def test_a_linear_one_gets_through_the_gelu(self, hf_layout: Path, tmp_path: Path, approximate: str) -> None:
        """What llama.cpp computes with the two matrices, here in torch: W x + b, whichever GELU it takes."""
        linear_2 = {"multi_modal_projector.linear_2.weight": torch.eye(64) * 2}
        source = altered(hf_layout, tmp_path / "model", {"projector_hidden_act": "linear"}, **linear_2)
        export(str(source), tmp_path / "out")
        values, kinds, _ = read(pair(tmp_path / "out")[1])
        assert values["mm.0.weight"].shape == (64, 32) and values["mm.2.weight"].shape == (64, 64)
        features = 10 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        inner = F.gelu(F.linear(features, values["mm.0.weight"], values["mm.0.bias"]), approximate=approximate)
        found = F.linear(inner, values["mm.2.weight"], values["mm.2.bias"])
        weights = load_file(source / "model.safetensors")
        first = [weights[f"multi_modal_projector.linear_1.{part}"] for part in ("weight", "bias")]
        bias = weights["multi_modal_projector.linear_2.bias"]
        wanted = 2 * F.linear(features, first[0].half().float(), first[1]) + bias
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)

    def test_without_biases(self, hf_layout: Path, tmp_path: Path) -> None:
        shutil.copytree(hf_layout, tmp_path / "model")
        path = tmp_path / "model" / "model.safetensors"
        names = [f"multi_modal_projector.linear_{n}.bias" for n in (1, 2)]
        save_file({k: v for k, v in load_file(path).items() if k not in names}, path, metadata={"format": "pt"})
        export(str(tmp_path / "model"), tmp_path / "out")
        values = read(pair(tmp_path / "out")[1])[0]
        assert not values["mm.0.bias"].any() and not values["mm.2.bias"].any()


class TestHeader:
    def test_of_the_language_model(self, hf_layout: Path, exported: Path) -> None:
        header = read(pair(exported)[0])[2]
        text = json.loads((hf_layout / "config.json").read_text(encoding="utf-8"))["text_config"]
        wanted = {
            "general.architecture": "llama",
            "general.file_type": 1,
            "llama.vocab_size": text["vocab_size"],
            "llama.context_length": text["max_position_embeddings"],
            "llama.embedding_length": text["hidden_size"],
            "llama.block_count": text["num_hidden_layers"],
            "llama.feed_forward_length": text["intermediate_size"],
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS,
            "llama.attention.key_length": HEAD,
            "llama.attention.value_length": HEAD,
            "llama.rope.dimension_count": HEAD,
            "llama.rope.freq_base": text["rope_theta"],
        }
        assert {name: header.get(name) for name in wanted} == wanted
        assert header["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(text["rms_norm_eps"])
        assert not [name for name in header if "scaling" in name]

    def test_of_the_tower(self, hf_layout: Path, exported: Path) -> None:
        header = read(pair(exported)[1])[2]
        wanted = {
            "general.architecture": "clip",
            "clip.has_vision_encoder": True,
            "clip.has_llava_projector": True,
            "clip.projector_type": "mlp",
            "clip.use_gelu": False,
            "clip.vision.image_size": 32,
            "clip.vision.patch_size": 8,
            "clip.vision.embedding_length": 32,
            "clip.vision.feed_forward_length": 64,
            "clip.vision.attention.head_count": 2,
            "clip.vision.block_count": 2,
            "clip.vision.projection_dim": 64,
        }
        assert {name: header.get(name) for name in wanted} == wanted
        images = json.loads((hf_layout / "preprocessor_config.json").read_text(encoding="utf-8"))
        for part in ("mean", "std"):
            assert header[f"clip.vision.image_{part}"] == pytest.approx(images[f"image_{part}"])
        assert header["clip.vision.attention.layer_norm_epsilon"] == pytest.approx(1e-5)

    def test_gelu(self, hf_layout: Path, tmp_path: Path) -> None:
        source = altered(hf_layout, tmp_path / "model", {"vision_config.hidden_act": "gelu"})
        export(str(source), tmp_path / "out")
        assert read(pair(tmp_path / "out")[1])[2]["clip.use_gelu"] is True

    def test_positions_scaled_linearly(self, hf_layout: Path, tmp_path: Path) -> None:
        rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
        export(str(altered(hf_layout, tmp_path / "model", {"text_config.rope_parameters": rope})), tmp_path / "out")
        header = read(pair(tmp_path / "out")[0])[2]
        assert header["llama.rope.scaling.type"] == "linear" and header["llama.rope.scaling.factor"] == 4.0
        assert header["llama.rope.freq_base"] == 5e5

    def test_positions_scaled_as_in_llama_3(self, hf_layout: Path, tmp_path: Path) -> None:
        """Frequencies divided by the factors are the ones that transformers rotates by."""
        rope = {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128, "rope_theta": 500.0,
        }  # fmt: skip
        changes = {"text_config.rope_parameters": rope, "text_config.max_position_embeddings": 1024}
        source = altered(hf_layout, tmp_path / "model", changes)
        export(str(source), tmp_path / "out")
        factors = read(pair(tmp_path / "out")[0])[0]["rope_freqs.weight"]
        config = make_tiny_model(make_tiny_processor()).config.text_config
        config.rope_parameters, config.max_position_embeddings = rope, 1024
        wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = 500.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
        torch.testing.assert_close(plain / factors, wanted)
        assert 1.0 in factors and 8.0 in factors and ((factors > 1) & (factors < 8)).any()

    def test_rows_without_a_token_are_unused(self, hf_layout: Path, tmp_path: Path) -> None:
        original = load_file(hf_layout / "model.safetensors")
        rows = original["language_model.model.embed_tokens.weight"].shape[0]
        more = {
            name: torch.cat([original[name], torch.zeros(3, 64)])
            for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
        }
        source = altered(hf_layout, tmp_path / "model", {"text_config.vocab_size": rows + 3}, **more)
        export(str(source), tmp_path / "out")
        header = read(pair(tmp_path / "out")[0])[2]
        assert header["llama.vocab_size"] == len(header["tokenizer.ggml.tokens"]) == rows + 3
        assert header["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]
