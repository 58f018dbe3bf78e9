"""The layout on disk: names and files of llava-hf, read back bit by bit, by other programs too; whole or not there."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from qllava.config import InputError
from qllava.image_layout import ImageLayout
from qllava.models.checkpoint import build_processor, load_llava, write_aside
from qllava.models.vision import load_tower
from tests import commands
from tests.planted import full, planted
from tests.tiny_models import (
    make_image,
    make_tiny_llava,
    make_tiny_model,
    make_tiny_processor,
    make_tiny_tokenizer,
    save_llava,
)

# What llava-hf/llava-1.5-7b-hf has on the hub, for a tower of 3 blocks and a language model of 2.
LLAVA_HF_NAMES = {
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    "multi_modal_projector.linear_1.bias",
    "multi_modal_projector.linear_1.weight",
    "multi_modal_projector.linear_2.bias",
    "multi_modal_projector.linear_2.weight",
    "vision_tower.vision_model.embeddings.class_embedding",
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "vision_tower.vision_model.embeddings.position_embedding.weight",
    "vision_tower.vision_model.post_layernorm.bias",
    "vision_tower.vision_model.post_layernorm.weight",
    "vision_tower.vision_model.pre_layrnorm.bias",
    "vision_tower.vision_model.pre_layrnorm.weight",
}
LANGUAGE_LAYER = {
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "post_attention_layernorm.weight",
    "self_attn.k_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
}
VISION_LAYER = {
    "layer_norm1.bias",
    "layer_norm1.weight",
    "layer_norm2.bias",
    "layer_norm2.weight",
    "mlp.fc1.bias",
    "mlp.fc1.weight",
    "mlp.fc2.bias",
    "mlp.fc2.weight",
    "self_attn.k_proj.bias",
    "self_attn.k_proj.weight",
    "self_attn.out_proj.bias",
    "self_attn.out_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.q_proj.weight",
    "self_attn.v_proj.bias",
    "self_attn.v_proj.weight",
}
LLAVA_HF_NAMES |= {f"language_model.model.layers.{i}.{name}" for i in range(2) for name in LANGUAGE_LAYER}
LLAVA_HF_NAMES |= {f"vision_tower.vision_model.encoder.layers.{i}.{name}" for i in range(3) for name in VISION_LAYER}

FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}

TEXT = "<|im_start|>user\n<image>\nWhat colour?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return make_tiny_processor()


@pytest.fixture(scope="module")
def model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    return make_tiny_model(processor)


@pytest.fixture
def saved(model: LlavaForConditionalGeneration, processor: LlavaProcessor, tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    save_llava(model, processor, folder)
    return folder


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def inputs_of(processor: LlavaProcessor) -> Any:
    return processor(images=make_image("red", (40, 25)), text=TEXT, return_tensors="pt")


def assert_same_weights(left: torch.nn.Module, right: torch.nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_names_and_files_are_those_of_llava_hf(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", framework="pt") as weights:
        assert set(weights.keys()) == LLAVA_HF_NAMES
        assert weights.metadata() == {"format": "pt"}
    assert {path.name for path in saved.iterdir()} == FILES
    assert read(saved / "processor_config.json") == {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 8,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }


def test_what_transformers_4_reads_is_there(saved: Path, processor: LlavaProcessor) -> None:
    config = read(saved / "config.json")
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["image_seq_length"] == 16
    assert config["text_config"]["rope_theta"] == 10000.0
    tokenizer = read(saved / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in tokenizer
    assert tokenizer["additional_special_tokens"] == ["<|im_start|>", "<image>"]
    assert read(saved / "preprocessor_config.json")["image_processor_type"] == "LlavaImageProcessor"
    assert (saved / "chat_template.jinja").read_text() == processor.chat_template


def test_reload_is_bit_equal(saved: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    _, report = LlavaForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not any(report.values())

    again, processor_again = load_llava(str(saved), dtype=torch.float32)

    assert not again.training
    assert_same_weights(model, again)
    before, after = inputs_of(processor), inputs_of(processor_again)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert processor_again.tokenizer.all_special_tokens == processor.tokenizer.all_special_tokens
    assert processor_again.chat_template == processor.chat_template


def test_what_transformers_writes_is_read_too(tmp_path: Path, model: LlavaForConditionalGeneration) -> None:
    again, processor = load_llava(str(make_tiny_llava(tmp_path / "plain")), dtype="auto")

    assert_same_weights(model, again)
    assert inputs_of(processor)["input_ids"].eq(3).sum() == 16


def test_a_process_without_qllava_gives_equal_logits(
    saved: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    inputs = inputs_of(processor)
    with torch.no_grad():
        expected = model(**inputs).logits
    make_image("red", (40, 25)).save(saved.parent / "image.png")
    script = """
import sys, torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, image, text, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder)
inputs = processor(images=Image.open(image), text=text, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
assert not any(name.split(".")[0] == "qllava" for name in sys.modules)
save_file({"logits": logits, "input_ids": inputs["input_ids"]}, out)
"""
    out = saved.parent / "logits.safetensors"
    words = ["-c", script, saved, saved.parent / "image.png", TEXT, out]

    done = commands.run(*words, cwd=saved.parent, env=commands.without_clone())

    assert done.returncode == 0, done.stderr
    theirs = load_file(out)
    assert torch.equal(theirs["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(theirs["logits"], expected, rtol=0, atol=1e-5)


def test_shards(tmp_path: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    save_llava(model, processor, tmp_path / "sharded", max_shard_size="200KB")

    index = read(tmp_path / "sharded" / "model.safetensors.index.json")
    assert set(index["weight_map"]) == LLAVA_HF_NAMES
    shards = {path.name for path in (tmp_path / "sharded").glob("*.safetensors")}
    assert shards == set(index["weight_map"].values())
    assert len(shards) > 1
    again, _ = load_llava(str(tmp_path / "sharded"), dtype=torch.float32)
    assert_same_weights(model, again)


def test_a_tied_head_is_written_once(tmp_path: Path, processor: LlavaProcessor) -> None:
    config = make_tiny_model(processor).config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = LlavaForConditionalGeneration(config)

    save_llava(model, processor, tmp_path / "tied")

    names = load_file(tmp_path / "tied" / "model.safetensors").keys()
    assert names == LLAVA_HF_NAMES - {"language_model.lm_head.weight"}
    again, _ = load_llava(str(tmp_path / "tied"), dtype=torch.float32)
    assert_same_weights(model, again)
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight


def test_a_head_that_was_trained_apart_stays_apart(tmp_path: Path, processor: LlavaProcessor) -> None:
    model = make_tiny_model(processor)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True

    save_llava(model, processor, tmp_path / "untied")

    again, _ = load_llava(str(tmp_path / "untied"), dtype=torch.float32)
    assert_same_weights(model, again)


def test_siglip_tower(tmp_path: Path) -> None:
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(vision).save_pretrained(tmp_path / "tower")
    CLIPImageProcessor().save_pretrained(tmp_path / "tower")
    processor = build_processor(make_tiny_tokenizer(), load_tower(str(tmp_path / "tower")), "{{ messages }}")
    config = LlavaConfig(
        vision_config=vision,
        text_config=make_tiny_model(make_tiny_processor()).config.text_config,
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()

    save_llava(model, processor, tmp_path / "saved")

    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert "vision_tower.vision_model.head.probe" in names
    again, processor_again = load_llava(str(tmp_path / "saved"), dtype=torch.float32)
    assert_same_weights(model, again)
    with torch.no_grad():
        assert torch.equal(model(**inputs_of(processor)).logits, again(**inputs_of(processor_again)).logits)


@pytest.mark.parametrize(
    ("kind", "image_size", "patch_size", "expected"),
    [("clip", 336, 14, 576), ("clip", 224, 14, 256), ("clip", 96, 16, 36), ("siglip", 384, 14, 729)],
)
def test_image_tokens_match_the_features(
    tmp_path: Path, kind: str, image_size: int, patch_size: int, expected: int
) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**sizes, "image_size": image_size, "patch_size": patch_size}
    tower_model = (
        CLIPVisionModel(CLIPVisionConfig(**vision))
        if kind == "clip"
        else SiglipVisionModel(SiglipVisionConfig(**vision))
    )
    tower_model.save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path))
    config = LlavaConfig(vision_config=tower.model.config, vision_feature_select_strategy=tower.layout.strategy)

    inputs = inputs_of(build_processor(make_tiny_tokenizer(), tower))

    with torch.no_grad():
        features = tower.model(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1].shape[1]
    assert features - (tower.layout.strategy == "default") == expected
    assert inputs["input_ids"].eq(3).sum() == tower.layout.tokens == ImageLayout.of_config(config).tokens == expected


def test_tokenizer_without_image_token_is_refused(tmp_path: Path, processor: LlavaProcessor) -> None:
    CLIPVisionModel(CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                     image_size=16, patch_size=8)).save_pretrained(tmp_path)  # fmt: skip
    CLIPImageProcessor().save_pretrained(tmp_path)
    tokenizer = make_tiny_tokenizer()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["added_tokens"] = [token for token in core["added_tokens"] if token["content"] != "<image>"]
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer.from_str(json.dumps(core)))
    with pytest.raises(InputError, match="no token <image>"):
        build_processor(bare, load_tower(str(tmp_path)))


def test_an_old_processor_config_is_completed(saved: Path) -> None:
    """The first llava-hf files did not say how many tokens an image takes; transformers then dies of a TypeError."""
    (saved / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')

    _, processor = load_llava(str(saved), dtype=torch.float32)

    assert inputs_of(processor)["input_ids"].eq(3).sum() == 16


def test_a_processor_of_another_model_is_refused(saved: Path) -> None:
    config = read(saved / "processor_config.json")
    (saved / "processor_config.json").write_text(json.dumps({**config, "num_additional_image_tokens": 0}))
    with pytest.raises(InputError, match="writes 15 image tokens .* has 16 features"):
        load_llava(str(saved), dtype=torch.float32)


def test_settings_of_sampling_do_not_stop_saving(tmp_path: Path, processor: LlavaProcessor) -> None:
    model = make_tiny_model(processor)
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.9
    model.generation_config.top_p = 0.6
    model.generation_config.eos_token_id = None

    save_llava(model, processor, tmp_path / "saved")

    written = read(tmp_path / "saved" / "generation_config.json")
    assert "temperature" not in written
    assert written["eos_token_id"] == processor.tokenizer.eos_token_id
    assert model.generation_config.temperature == 0.9  # the model in hand is left alone


def test_rope_of_llama_3_for_both_generations(tmp_path: Path, processor: LlavaProcessor) -> None:
    config = make_tiny_model(processor, context=16384).config
    config.text_config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }

    save_llava(LlavaForConditionalGeneration(config), processor, tmp_path / "saved")

    text = read(tmp_path / "saved" / "config.json")["text_config"]
    assert text["rope_theta"] == 500000.0
    assert text["rope_scaling"]["rope_type"] == "llama3"
    again, _ = load_llava(str(tmp_path / "saved"), dtype=torch.float32)
    assert again.config.text_config.rope_parameters == config.text_config.rope_parameters


def test_nothing_is_overwritten(saved: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    before = {path: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(InputError, match="not empty"):
        save_llava(model, processor, saved)
    assert {path: path.read_bytes() for path in saved.iterdir()} == before

    (saved.parent / "file").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        save_llava(model, processor, saved.parent / "file")
    assert (saved.parent / "file").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path, model: LlavaForConditionalGeneration, processor: Any) -> None:
    (tmp_path / "empty").mkdir()
    save_llava(model, processor, tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, model: LlavaForConditionalGeneration, processor: Any, name: str
) -> None:
    """It fills late: the weights are written by then."""
    with (
        planted("write", f"*/{name}", full),
        pytest.raises(InputError, match="No space left on device.*incomplete files were removed"),
    ):
        save_llava(model, processor, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), write_aside(tmp_path / "out") as aside:
        (aside / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_writing_the_same(tmp_path: Path) -> None:
    theirs = tmp_path / f".out.{platform.node()}.{os.getppid()}.partial"
    elsewhere = tmp_path / ".out.another-machine.999999999.partial"
    theirs.mkdir()
    elsewhere.mkdir()
    with write_aside(tmp_path / "out"):
        pass
    assert theirs.is_dir() and elsewhere.is_dir()


def test_a_shard_size_that_is_none(tmp_path: Path, model: LlavaForConditionalGeneration, processor: Any) -> None:
    with pytest.raises(InputError, match="shard size 'huge'"):
        save_llava(model, processor, tmp_path / "out", max_shard_size="huge")


def test_a_quantized_model_is_refused(tmp_path: Path, processor: LlavaProcessor) -> None:
    model = make_tiny_model(processor)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="lm_head.weight .*merge it first"):
        save_llava(model, processor, tmp_path / "out")


def load_refused(folder: Path) -> str:
    with pytest.raises(InputError) as refused:
        load_llava(str(folder), dtype=torch.float32)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_broken_folders(saved: Path, tmp_path: Path, model: Any, processor: Any) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(saved, tmp_path / name))

    assert "nowhere does not exist" in load_refused(tmp_path / "nowhere")
    assert "is a file" in load_refused(saved / "config.json")

    (tmp_path / "empty").mkdir()
    assert "no config.json" in load_refused(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "merge it first" in load_refused(tmp_path / "empty")

    other = copy("other")
    (other / "config.json").write_text('{"model_type": "llama"}')
    assert "of type 'llama'" in load_refused(other)

    truncated = copy("truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    assert "truncated or corrupt" in load_refused(truncated)

    incomplete = copy("incomplete")
    tensors = load_file(incomplete / "model.safetensors")
    del tensors["multi_modal_projector.linear_2.bias"]
    save_file(tensors, incomplete / "model.safetensors", metadata={"format": "pt"})
    assert "lacks weights, for example multi_modal_projector.linear_2.bias" in load_refused(incomplete)

    narrow = copy("narrow")
    tensors = load_file(narrow / "model.safetensors")
    tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(64, 16)
    save_file(tensors, narrow / "model.safetensors", metadata={"format": "pt"})
    assert "multi_modal_projector.linear_1.weight is (64, 16) and should be (64, 32)" in load_refused(narrow)

    wordless = copy("wordless")
    (wordless / "tokenizer.json").unlink()
    assert "has no tokenizer.json or tokenizer.model" in load_refused(wordless)

    nonsense = copy("nonsense")
    (nonsense / "tokenizer.json").write_text("{}")
    assert "cannot be loaded" in load_refused(nonsense)

    sharded = tmp_path / "sharded"
    save_llava(model, processor, sharded, max_shard_size="200KB")
    next(iter(sorted(sharded.glob("*.safetensors")))).unlink()
    assert "model-00001-of-00004.safetensors are missing" in load_refused(sharded)
