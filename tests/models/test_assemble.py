"""Assembly and adapters: what is quantized, what is not, one more token, the base's identity, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from qllava.config import InputError
from qllava.conversation import CHATML, IMAGE_TOKEN
from qllava.models.adapter import (
    add_lora,
    load_adapter,
    load_projector,
    load_run,
    projector_state,
    read_record,
    save_projector,
    save_record,
)
from qllava.models.assemble import assemble, load_language_model
from qllava.models.language import load_tokenizer
from qllava.models.lora import Lora
from qllava.models.outline import Recipe, fingerprint, outline, template_of
from qllava.models.weights import EMBEDDING, HEAD, Base, language_model_name, open_weights
from tests.tiny_models import (
    make_tiny_llava,
    make_tiny_model,
    make_tiny_parts,
    make_tiny_processor,
    make_tiny_tokenizer,
)
from tests.tiny_runs import Tiny, refusal

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def quantized(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def every_linear_of_the_language_model(layers: int = 2) -> set[str]:
    paths = {name: "self_attn" if name[1:] == "_proj" else "mlp" for name in LINEAR}
    return {f"model.language_model.layers.{i}.{paths[name]}.{name}" for i in range(layers) for name in LINEAR}


class TestPrecision:
    def test_of_parts(self, tiny: Tiny) -> None:
        model = assemble(tiny.recipe()).model
        assert quantized(model) == every_linear_of_the_language_model()
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                assert module.weight.quant_type == "nf4"
                assert module.weight.quant_state.nested  # double quantization
                assert module.support_avx512bf16_for_cpu is False
        assert not any(p.requires_grad for p in model.parameters())
        assert all(p.dtype == torch.float32 for p in model.model.multi_modal_projector.parameters())

    def test_of_a_llava_that_exists(self, hf_layout: Path) -> None:
        assembled = assemble(Recipe(str(hf_layout), None, None, "mlp2x_gelu", -2, "pad", "", True))
        assert quantized(assembled.model) == every_linear_of_the_language_model()
        original = make_tiny_model(make_tiny_processor()).model.multi_modal_projector.state_dict()
        kept = assembled.model.model.multi_modal_projector.state_dict()
        assert all(torch.equal(kept[name], tensor) for name, tensor in original.items())
        assert assembled.recipe.template == "chatml"  # by its control tokens

    def test_without_4bit(self, tiny: Tiny) -> None:
        model = assemble(tiny.recipe(load_in_4bit=False)).model
        assert not quantized(model)
        source = load_file(tiny.language_model / "model.safetensors")
        layer = "layers.1.mlp.up_proj.weight"
        assert torch.equal(model.model.language_model.state_dict()[layer], source[f"model.{layer}"])

    def test_the_tower_is_the_towers(self, tiny: Tiny) -> None:
        tower = assemble(tiny.recipe()).model.model.vision_tower.state_dict()
        source = load_file(tiny.tower / "model.safetensors")
        assert {name.removeprefix("vision_model."): t.sum() for name, t in source.items()} == {
            name: t.sum() for name, t in tower.items() if "position_ids" not in name
        }

    def test_nothing_of_packing_stands_in_the_config(self, tiny: Tiny) -> None:
        assert "quantization" not in json.dumps(assemble(tiny.recipe()).model.config.to_dict())


class TestProjector:
    def test_is_drawn_from_its_own_seed(self, tiny: Tiny) -> None:
        torch.manual_seed(1)
        first = projector_state(assemble(tiny.recipe(), seed=3).model)
        torch.manual_seed(2)
        again, other = (projector_state(assemble(tiny.recipe(), seed=seed).model) for seed in (3, 4))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["linear_1.weight"], other["linear_1.weight"])

    def test_linear_is_linear(self, tiny: Tiny) -> None:
        projector = assemble(tiny.recipe(projector_type="linear")).model.model.multi_modal_projector
        x = torch.randn(3, 32)
        torch.testing.assert_close(projector(x), x @ projector.linear_1.weight.T)

    def test_goes_from_stage_to_stage(self, tiny: Tiny, tmp_path: Path) -> None:
        first, second = assemble(tiny.recipe(), seed=1).model, assemble(tiny.recipe(), seed=2).model
        save_projector(first, tmp_path)
        load_projector(second, tmp_path)
        assert all(torch.equal(t, projector_state(second)[name]) for name, t in projector_state(first).items())

    def test_under_an_adapter_the_trained_copy_is_the_projector(self, tiny: Tiny) -> None:
        model: Any = add_lora(assemble(tiny.recipe()), Lora(2, 4))
        wrapper = model.base_model.model.model.multi_modal_projector
        with torch.no_grad():
            wrapper.modules_to_save["default"].linear_1.bias.fill_(7)
        state = projector_state(model)
        assert set(state) == {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}
        assert state["linear_1.bias"].unique().tolist() == [7]

    @pytest.mark.parametrize("damage", ["missing", "cut off", "width", "names"])
    def test_one_that_does_not_fit(self, tiny: Tiny, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "projector.safetensors"
        model = assemble(tiny.recipe()).model
        state = projector_state(model)
        if damage == "cut off":
            path.write_bytes((tiny.stage1 / path.name).read_bytes()[:99])
        elif damage == "width":
            save_file({**state, "linear_1.weight": torch.zeros(64, 48)}, path)
        elif damage == "names":
            save_file({"weight": torch.zeros(64, 32)}, path)
        with pytest.raises(InputError) as caught:
            load_projector(model, tmp_path)
        message = refusal(caught.value)
        assert str(path) in message
        assert damage != "width" or ("(64, 48)" in message and "(64, 32)" in message)
        assert all(torch.equal(state[name], t) for name, t in projector_state(model).items())


class TestTokens:
    def test_image_is_one_more_and_the_rest_stays(self, tmp_path: Path) -> None:
        """A LLaMA that knows nothing of images, with an odd vocabulary and no padding token."""
        tokenizer = make_tiny_tokenizer()
        written = json.loads(tokenizer.backend_tokenizer.to_str())
        written["added_tokens"] = [t for t in written["added_tokens"] if t["content"] != IMAGE_TOKEN]
        written["model"]["vocab"] = {k: v for k, v in written["model"]["vocab"].items() if k != IMAGE_TOKEN}
        text = "What colour is the circle? <|im_start|>"
        before = tokenizer(text)["input_ids"]
        size = len(tokenizer)
        config = LlamaConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=size
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
        kept = ("tokenizer_class", "eos_token")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: settings[k] for k in kept}), encoding="utf-8")
        loaded: Any = load_tokenizer(str(tmp_path))
        model = load_language_model(str(tmp_path), torch.float32, "cpu", four_bit=True, tokens=len(loaded))
        assert loaded(text)["input_ids"] == before
        assert loaded.encode(f"a{IMAGE_TOKEN}b", add_special_tokens=False).count(
            loaded.convert_tokens_to_ids(IMAGE_TOKEN)
        ) == 1  # fmt: skip
        assert loaded.pad_token == loaded.eos_token
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert table.shape[0] >= len(loaded) and head.shape == table.shape
        source = load_file(tmp_path / "model.safetensors")
        assert torch.equal(table[:size], source["model.embed_tokens.weight"])
        if table.shape[0] > size:
            assert table.shape[0] % 64 == 0
            torch.testing.assert_close(table[size:], table[:size].mean(0).expand_as(table[size:]))
            torch.testing.assert_close(head[size:], head[:size].mean(0).expand_as(head[size:]))

    def test_a_full_vocabulary_grows(self, tmp_path: Path, tiny: Tiny) -> None:
        shutil.copytree(tiny.language_model, tmp_path / "llama")
        config = LlamaConfig.from_pretrained(tmp_path / "llama")
        tokenizer = make_tiny_tokenizer()
        tokenizer.add_tokens(["one more"])
        tokenizer.save_pretrained(tmp_path / "llama")
        assert config.vocab_size == len(tokenizer) - 1
        whole = assemble(tiny.recipe(language_model=str(tmp_path / "llama"), load_in_4bit=False))
        model, loaded = whole.model, whole.processor.tokenizer
        size = model.get_input_embeddings().weight.shape[0]
        assert size % 64 == 0 and size >= len(loaded) > config.vocab_size
        assert model.config.text_config.vocab_size == size
        # Who reads the weights one by one finds the same examples.
        base = outline(whole.recipe).base
        for name, table in ((EMBEDDING, model.get_input_embeddings()), (HEAD, model.get_output_embeddings())):
            assert torch.equal(base[name], table.weight)

    def test_generation_ends_with_a_turn(self, tiny: Tiny) -> None:
        assembled = assemble(tiny.recipe())
        end = assembled.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert assembled.model.generation_config.eos_token_id == [end]
        assert assembled.processor.chat_template == CHATML.chat_template()

    @pytest.mark.parametrize(
        ("controls", "chat_template", "expected"),
        [
            (["<|im_start|>", "<|im_end|>"], None, "chatml"),
            (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"], None, "llama_3"),
            ([], "{{ '[INST] ' }}", "llama_2"),
            (["<|im_start|>"], None, "vicuna_v1"),
            ([], None, "vicuna_v1"),
        ],
    )
    def test_template_by_tokenizer(self, controls: list[str], chat_template: str | None, expected: str) -> None:
        class Tokenizer:
            def get_vocab(self) -> dict[str, int]:
                return {token: index for index, token in enumerate(controls)}

        tokenizer: Any = Tokenizer()
        tokenizer.chat_template = chat_template
        assert template_of(tokenizer) == expected


def test_a_base_that_is_quantized_already(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.language_model, tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="is already quantized"):
        outline(tiny.recipe(language_model=str(tmp_path / "llama")))


def test_a_tower_in_memory_is_spilled(tiny: Tiny, tmp_path: Path) -> None:
    """As merge does with open_clip's: the same tensors, from a file."""
    weights, held = (
        open_weights(str(tiny.language_model), language_model_name),
        {"vision_tower.vision_model.x": torch.ones(3, 2)},
    )
    base = Base(weights, torch.float32, held)
    before = (sorted(base), base.sample("vision_tower.vision_model.x"))
    base.spill(tmp_path / "held.safetensors")
    assert (tmp_path / "held.safetensors").is_file() and "vision_tower.vision_model.x" in base
    assert sorted(base) == before[0] and torch.equal(base.sample("vision_tower.vision_model.x"), before[1])
    assert torch.equal(base["vision_tower.vision_model.x"], torch.ones(3, 2))


class TestIdentity:
    def test_fingerprint_is_the_bases(self, tiny: Tiny, tmp_path: Path) -> None:
        assembled = assemble(tiny.recipe(), seed=1)
        record = assembled.recipe
        assert record.fingerprint and record.dtype == "float32"
        # Another projector, and a model that was tuned, stand on the same base.
        assert assemble(record, seed=2).recipe.fingerprint == record.fingerprint
        other = make_tiny_parts(tmp_path, seed=5)[0]
        found = assemble(tiny.recipe(language_model=str(other))).recipe.fingerprint
        assert found != record.fingerprint
        with pytest.raises(InputError, match="was trained on another base than"):
            assemble(replace(record, language_model=str(other)))

    def test_of_a_llava_that_exists_the_projector_belongs_to_it(self, tiny: Tiny, tmp_path: Path) -> None:
        recipe = tiny.recipe(model=str(make_tiny_llava(tmp_path)), language_model=None, vision_tower=None)
        whole = outline(recipe)
        state = load_file(tmp_path / "model.safetensors")
        for name in state:
            if "linear_1.weight" in name:
                state[name][0, 0] += 1
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        other = outline(recipe)
        assert other.recipe.fingerprint != whole.recipe.fingerprint
        built = [
            fingerprint(found.model.config, found.processor.tokenizer, found.base, built=True)
            for found in (whole, other)
        ]
        assert built[0] == built[1] != whole.recipe.fingerprint

    @pytest.mark.parametrize("four_bit", [True, False])
    def test_does_not_depend_on_quantization(self, tiny: Tiny, four_bit: bool) -> None:
        found = assemble(tiny.recipe(load_in_4bit=four_bit)).recipe.fingerprint
        assert found == outline(tiny.recipe(dtype="bfloat16")).recipe.fingerprint

    def test_says_what_differs(self, tiny: Tiny, tmp_path: Path) -> None:
        record = outline(tiny.recipe()).recipe
        shutil.copytree(tiny.language_model, tmp_path / "llama")
        config = json.loads((tmp_path / "llama" / "config.json").read_text(encoding="utf-8"))
        config["rms_norm_eps"] = 1e-3
        (tmp_path / "llama" / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(InputError, match=r"\(different config\)"):
            outline(replace(record, language_model=str(tmp_path / "llama")))

    def test_record_is_read_as_it_was_written(self, tiny: Tiny, tmp_path: Path) -> None:
        recipe = tiny.recipe(fingerprint="0123", dtype="bfloat16")
        save_record(recipe, tmp_path)
        assert read_record(tmp_path) == recipe

    @pytest.mark.parametrize("content", [None, "{", '{"model": 1}', "[]"])
    def test_a_folder_that_is_no_run(self, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / "qllava.json").write_text(content, encoding="utf-8")
        with pytest.raises(InputError) as caught:
            load_run(tmp_path)
        assert "is not a run of qllava" in refusal(caught.value)

    def test_an_adapter_that_is_cut_off(self, tiny: Tiny, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        shutil.copytree(tiny.stage2 / "checkpoint-2", folder)
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(InputError, match="cannot be loaded"):
            load_adapter(assemble(tiny.recipe()), folder)


class TestRefusals:
    def refused(self, recipe: Recipe) -> str:
        with pytest.raises(InputError) as caught:
            assemble(recipe)
        return refusal(caught.value)

    def test_half_of_the_parts(self, tiny: Tiny) -> None:
        assert "both language_model and vision_tower" in self.refused(tiny.recipe(vision_tower=None))

    def test_no_folder(self, tiny: Tiny, tmp_path: Path) -> None:
        assert "none does not exist. Give the folder" in self.refused(
            tiny.recipe(language_model=str(tmp_path / "none"))
        )

    def test_no_llama(self, tiny: Tiny) -> None:
        message = self.refused(tiny.recipe(language_model=str(tiny.tower)))
        assert "clip_vision_model" in message and "Mistral" in message

    def test_no_weights(self, tiny: Tiny, tmp_path: Path) -> None:
        shutil.copytree(tiny.language_model, tmp_path / "llama", ignore=shutil.ignore_patterns("*.safetensors"))
        assert "has no weights" in self.refused(tiny.recipe(language_model=str(tmp_path / "llama")))

    def test_no_tokenizer(self, tiny: Tiny, tmp_path: Path) -> None:
        shutil.copytree(tiny.language_model, tmp_path / "llama", ignore=shutil.ignore_patterns("token*"))
        assert "cannot be loaded" in self.refused(tiny.recipe(language_model=str(tmp_path / "llama")))

    def test_weights_that_are_cut_off(self, tiny: Tiny, tmp_path: Path) -> None:
        shutil.copytree(tiny.language_model, tmp_path / "llama")
        path = tmp_path / "llama" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        assert "are truncated or corrupt" in self.refused(tiny.recipe(language_model=str(tmp_path / "llama")))

    def test_a_part_of_the_weights(self, tiny: Tiny, tmp_path: Path) -> None:
        """What is missing would be drawn at random, with no more than a warning."""
        shutil.copytree(tiny.language_model, tmp_path / "llama")
        path = tmp_path / "llama" / "model.safetensors"
        state = load_file(path)
        del state["model.layers.1.mlp.up_proj.weight"]
        save_file(state, path, metadata={"format": "pt"})
        for four_bit in (True, False):
            recipe = tiny.recipe(language_model=str(tmp_path / "llama"), load_in_4bit=four_bit)
            assert "up_proj" in self.refused(recipe)


def test_mistral_is_taken(tiny: Tiny, tmp_path: Path) -> None:
    config = MistralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(make_tiny_tokenizer()), sliding_window=None,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    model = assemble(tiny.recipe(language_model=str(tmp_path))).model
    assert quantized(model) == every_linear_of_the_language_model(1)


def test_a_llava_as_transformers_saves_it_is_taken(tmp_path: Path) -> None:
    folder = make_tiny_llava(tmp_path / "llava")
    model = assemble(Recipe(str(folder), None, None, "mlp2x_gelu", -2, "pad", "chatml", True)).model
    assert quantized(model) == every_linear_of_the_language_model()
