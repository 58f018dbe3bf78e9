"""Merging: the same model as the adapter on its base, in a process without qllava."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from qllava import merge as merging
from qllava.merge import TIE, Comparison, MergeResult, lost_by_choice
from qllava.models.adapter import load_run
from qllava.models.vision import load_tower
from qllava.training.run import finetune
from tests import commands
from tests.tiny_models import make_tiny_model, make_tiny_processor
from tests.tiny_runs import Tiny, run_merge, settings, stage2_settings, write_records

QUESTION = "What colour is it?"
# What any program does that knows transformers and has never heard of qllava.
READER = """
import json, sys, torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, image, question, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
inputs = processor(images=Image.open(image).convert("RGB"), text=prompt, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
torch.save({"ids": ids, "logits": logits, "text": processor.decode(ids[0, inputs["input_ids"].shape[1]:])}, out)
assert "qllava" not in sys.modules
"""


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# What llava-hf/llava-1.5-7b-hf calls its tensors, for a tower of 3 layers and a LLaMA of 2.
_VISION = "vision_tower.vision_model"
_TOWER_LAYER = [
    f"{part}.{kind}"
    for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2",
                 *(f"self_attn.{x}_proj" for x in ("k", "out", "q", "v")))
    for kind in ("bias", "weight")
]  # fmt: skip
_LLAMA_LAYER = [
    "input_layernorm", "post_attention_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
    "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
]  # fmt: skip
LAYOUT = [
    f"{_VISION}.embeddings.class_embedding",
    f"{_VISION}.embeddings.patch_embedding.weight",
    f"{_VISION}.embeddings.position_embedding.weight",
    *(f"{_VISION}.{norm}.{kind}" for norm in ("pre_layrnorm", "post_layernorm") for kind in ("bias", "weight")),
    *(f"{_VISION}.encoder.layers.{n}.{name}" for n in range(3) for name in _TOWER_LAYER),
    *(f"multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("bias", "weight")),
    "language_model.model.embed_tokens.weight",
    *(f"language_model.model.layers.{n}.{name}.weight" for n in range(2) for name in _LLAMA_LAYER),
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",
]


def open_clip_tower(folder: Path) -> str:
    """A whole CLIP as open_clip saves it."""
    folder.mkdir()
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 1, "layers": 1}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    preprocessing = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
    config = {"model_cfg": model, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(open_clip.CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    return f"open_clip:local-dir:{folder}"


def siglip_tower(folder: Path) -> str:
    """A SigLIP vision model as transformers saves it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


TOWERS = {"open_clip": open_clip_tower, "siglip": siglip_tower}


def read(folder: Path, image: Path, out: Path) -> dict[str, Any]:
    # Away from the clone, so that nothing of it can be imported.
    done = commands.run("-c", READER, folder, image, QUESTION, out, cwd=out.parent, env=commands.without_clone())
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


def ask_adapter(folder: Path, image: Path) -> dict[str, Any]:
    """The same question to base and adapter."""
    model, processor = load_run(folder)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(images=Image.open(image).convert("RGB"), text=prompt, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return {"ids": ids, "logits": logits, "text": processor.decode(ids[0, inputs["input_ids"].shape[1] :])}


@pytest.fixture(scope="module")
def learned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a rate so high that an adapter which is left out cannot go unseen."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    return finetune(stage2_settings(tiny, folder, learning_rate=2e-2, projector_lr=1e-2))


@pytest.fixture(scope="module")
def sure(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned its examples by heart.

    A random model doubts every token: what rounding to 16 bit does to it is as large as what a fault would do.
    """
    folder = tmp_path_factory.mktemp("sure") / "run"
    quick = {"max_steps": 60, "eval_steps": 60, "save_steps": 60, "learning_rate": 1e-2, "projector_lr": 1e-2}
    return finetune(stage2_settings(tiny, folder, **quick))


@pytest.fixture(scope="module")
def merged(learned: Path) -> tuple[Path, MergeResult]:
    out = learned.parent / "merged"
    return out, run_merge(learned, out)


class TestTheMergedModel:
    def test_agrees(self, merged: tuple[Path, MergeResult]) -> None:
        _, result = merged
        assert result.base == "nf4" and result.verified
        assert result.kl_per_token is not None and 0 <= result.kl_per_token < 1e-6
        assert result.top1_agreement == result.same_text == 1.0

    def test_accounts_for_every_tensor(self, merged: tuple[Path, MergeResult]) -> None:
        said = json.loads((merged[0] / "merge.json").read_text(encoding="utf-8"))
        tensors = said["tensors"]
        assert sorted(tensors["merged"] + tensors["copied"] + tensors["replaced"]) == sorted(LAYOUT)
        assert {name.split(".")[-2] for name in tensors["merged"]} == LINEAR and len(tensors["merged"]) == 14
        assert {name.split(".")[0] for name in tensors["replaced"]} == {"multi_modal_projector"}
        assert tensors["left_out"] == [] and said["verified"] is True

    def test_has_llava_hfs_names(self, merged: tuple[Path, MergeResult]) -> None:
        assert sorted(load_file(merged[0] / "model.safetensors")) == sorted(LAYOUT)

    def test_in_shards(self, learned: Path, merged: tuple[Path, MergeResult], tmp_path: Path) -> None:
        assert run_merge(learned, tmp_path / "out", max_shard_size="100KB").verified
        shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
        assert len(shards) > 3
        state = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
        whole = load_file(merged[0] / "model.safetensors")
        assert state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in whole)

    def test_answers_without_qllava(
        self, tiny: Tiny, learned: Path, merged: tuple[Path, MergeResult], tmp_path: Path
    ) -> None:
        image = tiny.rows.parent / "1.png"
        found = read(merged[0], image, tmp_path / "found.pt")
        expected = ask_adapter(learned, image)
        assert found["text"] == expected["text"] and expected["text"]
        assert torch.equal(found["ids"], expected["ids"])
        assert (found["logits"] - expected["logits"]).abs().max() <= 1e-4
        other = ask_adapter(tiny.stage2, image)
        assert (found["logits"] - other["logits"]).abs().max() > 0.1, "the adapter has to matter here"

    def test_can_be_published(self, merged: tuple[Path, MergeResult]) -> None:
        """No path of this machine in its config, and files that others may read."""
        assert "_name_or_path" not in (merged[0] / "config.json").read_text(encoding="utf-8")
        modes = {path.stat().st_mode for path in merged[0].iterdir()}
        assert len(modes) == 1

    def test_is_a_plain_checkpoint(self, learned: Path, merged: tuple[Path, MergeResult]) -> None:
        out, _ = merged
        state = load_file(out / "model.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        assert not any("lora" in name or "absmax" in name or "quant" in name for name in state)
        trained = load_file(learned / "projector.safetensors")
        for name, tensor in trained.items():
            assert torch.equal(state[f"multi_modal_projector.{name}"], tensor)
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        assert "quantization_config" not in json.dumps(config)
        card = (out / "README.md").read_text(encoding="utf-8")
        assert "NF4 weights that training saw" in card and "KL" in card
        assert not list(out.parent.glob(".*"))

    def test_its_weights_are_base_plus_delta(self, tiny: Tiny, learned: Path, merged: tuple[Path, MergeResult]) -> None:
        """W = dequantize(NF4) + alpha / r B A, with the quantization done here once more from the original weights."""
        name = "model.layers.1.mlp.down_proj"
        layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=True)
        layer.weight.data.copy_(load_file(tiny.language_model / "model.safetensors")[f"{name}.weight"])
        layer.to("cpu")
        base = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        adapter = load_file(learned / "adapter_model.safetensors")
        prefix = "base_model.model.model.language_model.layers.1.mlp.down_proj"
        delta = 2 * adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"]
        found = load_file(merged[0] / "model.safetensors")[f"language_model.{name}.weight"]
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(found, base + delta, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_in_half_precision(self, sure: Path, tmp_path: Path, dtype: str) -> None:
        result = run_merge(sure, tmp_path / "out", dtype=dtype)
        assert result.verified and result.kl_per_token is not None and result.kl_per_token < 1e-4
        assert result.top1_agreement == 1.0
        state = load_file(tmp_path / "out" / "model.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {getattr(torch, dtype)}

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_a_short_run_on_a_16_bit_base(self, tiny: Tiny, tmp_path: Path, seed: int) -> None:
        """The base as a card holds it: its NF4 weights are unpacked in fp32, so that small deltas do not vanish.

        Unpacked in bf16 the KL was 3.9e-4, whatever the result's type, and up to 4 % of the tokens were others.
        """
        run = finetune(stage2_settings(tiny, tmp_path / "run", seed=seed))
        record = json.loads((run / "qllava.json").read_text(encoding="utf-8"))
        (run / "qllava.json").write_text(json.dumps({**record, "dtype": "bfloat16"}), encoding="utf-8")
        for dtype, most in (("float32", 1e-6), ("float16", 2e-5)):
            result = run_merge(run, tmp_path / dtype, dtype=dtype)
            assert result.verified and result.kl_per_token is not None and result.kl_per_token < most
            assert result.top1_agreement == 1.0

    def test_onto_the_original_weights(self, tiny: Tiny, tmp_path: Path) -> None:
        result = run_merge(tiny.stage2, tmp_path / "out", base="original")
        assert result.base == "original" and result.kl_per_token is not None
        assert result.kl_per_token > 1e-4  # another model than the one that was trained; reported, not judged
        assert result.verified is merging.Comparison(result.kl_per_token, 1, 1, 1).agrees
        card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        assert ("not the model that was trained" in card) is not result.verified
        assert "original weights" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    def test_unverified_as_asked(self, tiny: Tiny, tmp_path: Path) -> None:
        result = run_merge(tiny.stage2, tmp_path / "out", verify=False)
        assert result == MergeResult("nf4", None, None, None, False)
        assert (tmp_path / "out" / "config.json").is_file()


class TestTheVerdict:
    """What rounding may do, and what no rounding does."""

    # Two tokens of three: the first model prefers token 0 to token 1 by 0.01 nats in example 0, by 1 nat in example 1.
    WANTED = torch.tensor([[1.00, 0.99, -3.0], [1.00, 0.00, -3.0]]).log_softmax(-1)

    def test_the_same(self) -> None:
        assert lost_by_choice(self.WANTED, self.WANTED).tolist() == [0.0, 0.0]

    def test_a_tie_and_another_token(self) -> None:
        found = torch.tensor([[0.99, 1.00, -3.0], [0.00, 1.00, -3.0]]).log_softmax(-1)
        lost = lost_by_choice(self.WANTED, found)
        assert lost.tolist() == pytest.approx([0.01, 1.0], abs=1e-6)
        assert lost[0] < TIE < lost[1]

    @pytest.mark.parametrize(
        ("kl", "same_or_tie", "agrees"),
        [(0.0, 1.0, True), (1e-3, 0.995, True), (1.1e-3, 1.0, False), (0.0, 0.99, False), (0.0, 44 / 45, False)],
    )
    def test_bounds(self, kl: float, same_or_tie: float, agrees: bool) -> None:
        # The share of the very same token is reported; of few tokens one tie would be more than the bound allows.
        assert Comparison(kl, 0.9, same_or_tie, 1.0).agrees is agrees

    @pytest.mark.parametrize(
        ("wanted", "found", "same"),
        [
            ([5, 6, 7], [5, 6, 7], True),
            ([5, 6, 7], [5, 8, 7], False),
            ([5, 9, 7], [5, 9, 8], True),  # both say 9, not 6: what follows was asked behind another text
            ([5, 9, 7], [5, 6, 7], False),
        ],
    )
    def test_a_greedy_answer(self, wanted: list[int], found: list[int], same: bool) -> None:
        assert merging._same_text(*(torch.tensor(x) for x in (wanted, found, [5, 6, 7]))) is same

    @pytest.mark.parametrize(("learned", "length"), [([0, 1, 1, 0, 1], 2), ([0, 1, 1], 2), ([1], 1)])
    def test_the_first_answer(self, learned: list[int], length: int) -> None:
        assert merging._first_answer(torch.tensor(learned, dtype=torch.bool)) == length


class TestOtherRuns:
    def test_a_checkpoint(self, tiny: Tiny, tmp_path: Path) -> None:
        assert run_merge(tiny.stage2 / "checkpoint-2", tmp_path / "out").verified
        state = load_file(tmp_path / "out" / "model.safetensors")
        trained = load_file(tiny.stage2 / "checkpoint-2" / "projector.safetensors")
        assert torch.equal(state["multi_modal_projector.linear_1.weight"], trained["linear_1.weight"])
        final = load_file(tiny.stage2 / "projector.safetensors")
        assert not torch.equal(final["linear_1.weight"], trained["linear_1.weight"])

    def test_a_checkpoint_of_a_run_that_never_ended(self, tiny: Tiny, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.mkdir()
        shutil.copytree(tiny.stage2 / "checkpoint-2", run / "checkpoint-2")
        shutil.copy(tiny.stage2 / "probes.safetensors", run)  # written before the first step
        probes, first = (tiny.stage2 / name for name in ("probes.safetensors", "checkpoint-2"))
        assert probes.stat().st_mtime_ns < first.stat().st_mtime_ns
        assert run_merge(run / "checkpoint-2", tmp_path / "out").verified

    def test_a_linear_projector(self, tiny: Tiny, tmp_path: Path) -> None:
        rows = [{"image": "0.png", "question": "<image>", "answer": "red"}]
        captions = write_records(tiny.rows.with_name("captions.json"), rows)
        chosen = settings(tiny, tmp_path / "run", projector_type="linear", pretrain_file=captions, max_steps=2)
        assert run_merge(finetune(chosen), tmp_path / "out").verified
        state = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(state["multi_modal_projector.linear_2.weight"], torch.eye(64))

    @pytest.mark.parametrize("kind", ["open_clip", "siglip"])
    def test_another_tower(self, tiny: Tiny, tmp_path: Path, kind: str) -> None:
        """One that is converted when it is loaded, and one without a class token and with a head."""
        tower = TOWERS[kind](tmp_path / "tower")
        captions = write_records(
            tiny.rows.with_name("captions.json"), [{"image": "0.png", "question": "<image>", "answer": "red"}]
        )
        chosen = settings(tiny, tmp_path / "run", vision_tower=tower, pretrain_file=captions, max_steps=2)
        result = run_merge(finetune(chosen), tmp_path / "out")
        assert result.verified and result.kl_per_token is not None and result.kl_per_token < 1e-6
        assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
        state = load_file(tmp_path / "out" / "model.safetensors")
        wanted = load_tower(tower).model.state_dict()
        assert {name for name in state if name.startswith("vision_tower")} == {f"{_VISION}.{name}" for name in wanted}
        assert all(torch.equal(state[f"{_VISION}.{name}"], tensor) for name, tensor in wanted.items())

    def test_a_llava_that_exists_in_4bit(self, tiny: Tiny, hf_layout: Path, tmp_path: Path) -> None:
        given = {"language_model": None, "vision_tower": None, "model_name_or_path": hf_layout}
        folder = finetune(settings(tiny, tmp_path / "run", learning_rate=2e-2, **given))
        result = run_merge(folder, tmp_path / "out")
        assert result.verified and result.kl_per_token is not None and result.kl_per_token < 1e-6
        original = make_tiny_model(make_tiny_processor())
        whole = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert torch.equal(whole.lm_head.weight, original.lm_head.weight)
        tower, kept = original.model.vision_tower.state_dict(), whole.model.vision_tower.state_dict()
        assert all(torch.equal(kept[name], tensor) for name, tensor in tower.items())

    def test_without_4bit(self, tiny: Tiny, tmp_path: Path) -> None:
        chosen = stage2_settings(tiny, tmp_path / "run", load_in_4bit=False, learning_rate=2e-2, max_steps=2)
        result = run_merge(finetune(chosen), tmp_path / "out")
        assert result.verified and result.kl_per_token is not None and result.kl_per_token < 1e-6
