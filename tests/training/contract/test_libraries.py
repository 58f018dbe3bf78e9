"""What we lean on inside TRL, transformers, peft and bitsandbytes, written down once (architecture, decision 13).

When a new release changes one of these, its test names what to look at in qllava; nothing here tests qllava itself.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration, Trainer
from trl import SFTConfig, SFTTrainer

from qllava.data.collate import Collator
from qllava.models.lora import LORA_TARGETS
from qllava.training.objectives.supervised import supervised
from qllava.training.step.exact import PackOutput
from tests.tiny_models import make_tiny_llava, make_tiny_model, make_tiny_processor

COLUMNS = {
    "id": ["a", "b"],
    "input_ids": [[5, 6, 7], [8, 9]],
    "labels": [[-100, 6, 7], [-100, 9]],
    "image_files": [[], []],
}


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def make(model: Any, folder: Path, **fields: Any) -> SFTTrainer:
    """An SFTTrainer as `LlavaTrainer` makes it, over two examples of text."""
    processor = make_tiny_processor()
    config = SFTConfig(
        output_dir=str(folder), dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, bf16=False,
        report_to="none", per_device_train_batch_size=2, max_steps=1, gradient_checkpointing=False, **fields,
    )  # fmt: skip
    collator = Collator(processor.tokenizer.pad_token_id, processor.image_processor)

    def without_ids(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collator(rows)
        batch.pop("ids")
        return batch

    return SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_dict(COLUMNS), data_collator=without_ids,
        processing_class=processor.tokenizer,
    )  # fmt: skip


@pytest.fixture
def model() -> LlavaForConditionalGeneration:
    return make_tiny_model(make_tiny_processor())


@pytest.fixture
def adapted(model: LlavaForConditionalGeneration) -> PeftModel:
    config = LoraConfig(r=2, target_modules=LORA_TARGETS, modules_to_save=["multi_modal_projector"])
    return get_peft_model(model, config)  # type: ignore[return-value,arg-type]


class TestTransformersTrainer:
    def test_methods_that_are_overridden(self) -> None:
        assert parameters(Trainer._get_grad_norm) == ["self", "model", "grad_norm"]
        assert parameters(Trainer._save_checkpoint) == ["self", "model", "trial"]
        assert parameters(Trainer._get_output_dir) == ["self", "trial"]
        # What is overridden calls it twice: to log and save, and to evaluate.
        assert "model" in parameters(Trainer._maybe_log_save_evaluate)
        assert parameters(Trainer._load_from_checkpoint) == ["self", "resume_from_checkpoint", "model"]
        assert parameters(Trainer._save) == ["self", "output_dir", "state_dict"]
        assert parameters(Trainer._load_scaler) == ["self", "checkpoint"]
        assert parameters(Trainer._init_training_state)[:2] == ["self", "max_steps"]
        assert parameters(Trainer.create_optimizer) == ["self", "model"]
        assert parameters(Trainer.get_optimizer_cls_and_kwargs)[0] == "args"

    @pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
    def test_the_norm_is_asked_for_before_the_optimizer_steps(
        self, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_grad_norm: float
    ) -> None:
        order: list[str] = []
        asked = Trainer._get_grad_norm

        def norm(self: Any, *args: Any, **kwargs: Any) -> Any:
            order.append("norm")
            value = asked(self, *args, **kwargs)
            assert float(value) > 0
            return value

        monkeypatch.setattr(Trainer, "_get_grad_norm", norm)
        trainer = make(model, tmp_path, max_grad_norm=max_grad_norm, save_strategy="no")
        step = torch.optim.AdamW.step
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: (order.append("step"), step(*a, **k))[1])
        trainer.train()
        assert order == ["norm", "step"]

    def test_a_checkpoint_goes_below_the_output_dir_that_is_asked_for(
        self, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The whole checkpoint, so that it can be written aside and renamed."""
        trainer = make(model, tmp_path / "run", save_strategy="no")
        trainer.train()
        monkeypatch.setattr(trainer, "_get_output_dir", lambda trial=None: str(tmp_path / "aside"))
        trainer._save_checkpoint(model, None)
        names = {p.name for p in (tmp_path / "aside" / "checkpoint-1").iterdir()}
        assert names >= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
        assert not list((tmp_path / "run").glob("checkpoint-*"))

    def test_fsdp_is_switched_on_after_the_model_is_built(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """So the field `fsdp` is refused: `models.assemble` lays out 4-bit weights by this variable of accelerate's."""
        monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
        config = SFTConfig(output_dir=str(tmp_path), fsdp=True, bf16=False)
        assert config.fsdp_plugin_args and "ACCELERATE_USE_FSDP" not in os.environ

    def test_adamw_decays_where_nothing_is_said(self, model: Any, tmp_path: Path) -> None:
        """So the groups have to say it."""
        trainer = make(model, tmp_path)
        kind, arguments = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
        assert "weight_decay" not in arguments
        assert inspect.signature(kind).parameters["weight_decay"].default == 1e-2

    def test_a_model_marked_as_quantized_is_not_trained_without_an_adapter(self, model: Any, tmp_path: Path) -> None:
        model.is_quantized = True
        with pytest.raises(ValueError, match="purely quantized"):
            make(model, tmp_path)


class TestTrl:
    def test_what_trains_on_a_marked_model_is_cast_to_bf16(self, adapted: Any, tmp_path: Path) -> None:
        """So the mark is taken away before."""
        adapted.base_model.model.is_loaded_in_4bit = True
        assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
        make(adapted, tmp_path)
        assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.bfloat16}

    def test_what_trains_on_an_unmarked_model_stays(self, adapted: Any, tmp_path: Path) -> None:
        adapted.base_model.model.is_loaded_in_4bit = False
        make(adapted, tmp_path)
        assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}

    def test_rows_that_are_encoded_stay_as_they_are(self, model: Any, tmp_path: Path) -> None:
        trainer = make(model, tmp_path)
        assert trainer.train_dataset.to_dict() == COLUMNS
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch.keys() == {"input_ids", "labels", "attention_mask"}

    def test_metrics_of_an_evaluation_are_averaged_from_a_list(self, model: Any, tmp_path: Path) -> None:
        trainer = make(model, tmp_path)
        trainer.model.eval()
        trainer._metrics["eval"]["exact_match"].append(0.25)
        logs: dict[str, float] = {"eval_loss": 1.0}
        trainer.log(logs)
        assert logs["eval_exact_match"] == 0.25
        assert not trainer._metrics["eval"]

    def test_the_loss_is_over_the_tokens_of_the_whole_step(self, model: Any, tmp_path: Path) -> None:
        trainer = make(model, tmp_path)
        batch = next(iter(trainer.get_train_dataloader()))
        model.train()
        own = trainer.compute_loss(model, dict(batch))
        of_step = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(6))
        torch.testing.assert_close(own * 3, of_step * 6)
        with torch.no_grad():
            torch.testing.assert_close(own.detach(), model(**batch).loss)

    @pytest.mark.parametrize("loss_type", ["nll", "dft"])
    def test_our_objective_is_the_loss_and_the_metrics_of_trl(self, model: Any, tmp_path: Path, loss_type: str) -> None:
        trainer = make(model, tmp_path, loss_type=loss_type)
        batch = next(iter(trainer.get_train_dataloader()))
        model.train()
        expected = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(6))
        out = model(**batch, fused_lm_head=True)
        learned = out.label_mask
        found = PackOutput(out.log_probs[learned], learned[learned], out.entropy[learned], out.is_top1[learned])
        ours = supervised(loss_type)(found, torch.tensor(6))
        torch.testing.assert_close(ours.loss, expected)
        for name, total in ours.sums.items():
            assert float(total / ours.learned) == pytest.approx(trainer._metrics["train"][name][-1], rel=1e-6), name

    def test_padding_is_of_trls_own_collators(self, model: Any, tmp_path: Path) -> None:
        """So the field `pad_to_multiple_of` has no effect on packs (`training/options/table.py`)."""
        batch = next(iter(make(model, tmp_path, pad_to_multiple_of=64).get_train_dataloader()))
        assert batch["input_ids"].shape == (2, 3)

    def test_packs_hold_no_images(self) -> None:
        """So packing is ours (`data/packing.py`)."""
        assert "Packing is not supported for vision datasets" in inspect.getsource(SFTTrainer.__init__)

    def test_liger_replaces_layers_and_not_the_loss(self, model: Any, tmp_path: Path) -> None:
        """So the field `use_liger_kernel` is refused for what it does to norms and gates, which qllava compiles."""
        with pytest.warns(FutureWarning, match="removed in v2.0.0"):
            trainer = make(model, tmp_path, use_liger_kernel=True)
        assert trainer.args.liger_kernel_config == {"fused_linear_cross_entropy": False}

    def test_a_smoothed_label_needs_all_logits(self) -> None:
        """So the field `label_smoothing_factor` is refused."""
        assert "self.label_smoother(model(**logits_inputs)" in inspect.getsource(SFTTrainer.compute_loss)

    def test_a_model_card_is_made_by_a_method_of_this_name(self) -> None:
        assert "create_model_card" in inspect.getsource(SFTTrainer._save_checkpoint)


class TestPeft:
    def test_names_in_an_adapter(self, adapted: Any) -> None:
        names = set(get_peft_model_state_dict(adapted))
        assert "base_model.model.model.multi_modal_projector.linear_1.weight" in names
        assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in names
        assert not any("vision_tower" in name or "lm_head" in name for name in names)
        assert len(names) == 4 + 2 * 7 * 2

    def test_names_in_memory(self, adapted: Any) -> None:
        inner = adapted.base_model.model.model
        wrapper = inner.multi_modal_projector
        assert set(dict(wrapper.named_children())) == {"original_module", "modules_to_save"}
        assert all(p.requires_grad for p in wrapper.modules_to_save["default"].parameters())
        layer = inner.language_model.layers[0].mlp.up_proj
        assert hasattr(layer, "base_layer") and layer.scaling["default"] == 8 / 2
        assert layer.lora_A["default"].weight.shape == (2, 64) and not layer.lora_B["default"].weight.any()
        assert adapted.get_base_model() is adapted.base_model.model

    def test_a_hook_goes_with_the_copy_of_the_projector(self, model: Any) -> None:
        calls: list[Any] = []
        model.model.multi_modal_projector.register_forward_pre_hook(lambda module, inputs: calls.append(module))
        config = LoraConfig(r=2, target_modules=LORA_TARGETS, modules_to_save=["multi_modal_projector"])
        wrapper = get_peft_model(model, config).base_model.model.model.multi_modal_projector
        wrapper(torch.zeros(1, 16, 32))
        assert calls == [wrapper.modules_to_save["default"]]

    def test_layers_of_bitsandbytes_are_known_by_their_type(self, tmp_path: Path) -> None:
        """A language model that was put in its place quantized gets LoRA made for 4-bit layers."""
        loaded = four_bit(make_tiny_llava(tmp_path), ["model.multi_modal_projector", "model.vision_tower", "lm_head"])
        adapted = get_peft_model(loaded, LoraConfig(r=2, target_modules=LORA_TARGETS))
        layer = adapted.base_model.model.model.language_model.layers[0].mlp.up_proj
        assert type(layer).__module__ == "peft.tuners.lora.bnb"
        assert isinstance(layer.base_layer, bnb.nn.Linear4bit)


def four_bit(folder: Path, skip: list[str]) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skip
    )
    return LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})


class TestBitsAndBytes:
    def test_names_to_skip_are_whole_names(self, tmp_path: Path) -> None:
        folder = make_tiny_llava(tmp_path)
        usual = four_bit(folder, ["multi_modal_projector", "vision_tower", "lm_head"])
        assert isinstance(usual.model.multi_modal_projector.linear_1, bnb.nn.Linear4bit)
        right = four_bit(folder, ["model.multi_modal_projector", "model.vision_tower", "lm_head"])
        names = {name for name, module in right.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
        assert len(names) == 2 * 7 and all("language_model" in name for name in names)

    def test_the_mark_is_called_so(self, tmp_path: Path) -> None:
        model = four_bit(make_tiny_llava(tmp_path), ["model.multi_modal_projector", "model.vision_tower", "lm_head"])
        assert model.is_loaded_in_4bit is True and model.is_quantized is True

    def test_a_packed_layer(self) -> None:
        layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compress_statistics=True)
        assert layer.support_avx512bf16_for_cpu in (True, False)
        weight = layer.weight.detach().clone()
        layer.to("cpu")
        assert type(layer.weight).__name__ == "Params4bit" and layer.weight.numel() * 2 == 64 * 32
        full = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert full.shape == (32, 64) and (full - weight).abs().max() < 0.2 * weight.abs().max()


def test_safetensors_names_survive(tmp_path: Path, adapted: Any) -> None:
    adapted.save_pretrained(str(tmp_path))
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(get_peft_model_state_dict(adapted))
