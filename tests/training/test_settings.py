"""Settings from YAML and flags: who wins, what is refused and how."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaConfig
from trl import SFTConfig

from qllava.config import InputError, ModelConfig
from qllava.models.lora import Lora
from qllava.models.record import BELONGS_TO_BASE, Recipe, save_record
from qllava.training import main
from qllava.training.base import same_base
from qllava.training.memory import setup_of
from qllava.training.options import begin
from qllava.training.options.defaults import NANO_FINETUNE, NANO_PRETRAIN
from qllava.training.settings import Settings, TrainConfig, parse
from tests.tiny_runs import refusal


def read(*line: str, nano: dict[str, Any] | None = None) -> Settings:
    return parse(line, output_dir="runs/x", nano=nano or {})


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Write a YAML and return the two words that name it."""

    def write(text: str) -> tuple[str, str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return "--config", str(path)

    return write


def test_defaults_are_llavas() -> None:
    train = read().train
    assert (train.max_length, train.num_train_epochs, train.weight_decay, train.warmup_steps) == (2048, 1.0, 0.0, 0.03)
    assert train.lr_scheduler_type == "cosine"
    assert train.learning_rate is None and train.projector_lr is None  # the stage has its own
    assert train.output_dir == "runs/x"
    assert train.gradient_checkpointing


def test_flags_win_over_yaml_over_nanos_own(config: Any) -> None:
    nano = {"per_device_train_batch_size": 24, "eval_steps": 100, "learning_rate": 2e-3}
    words = config("per_device_train_batch_size: 4\neval_steps: 50\n")
    train = read(*words, "--eval_steps", "7", nano=nano).train
    assert (train.per_device_train_batch_size, train.eval_steps, train.learning_rate) == (4, 7, 2e-3)


@pytest.mark.parametrize("given", [["--language_model", "llama"], ["--model_name_or_path", "some/llava"]])
def test_nanos_values_are_for_nano_alone(given: list[str]) -> None:
    assert read(*given, nano={"eval_questions": 3}).train.eval_questions == 64
    assert read("--model_name_or_path", "nano", nano={"eval_questions": 3}).train.eval_questions == 3


class TestOtherMachines:
    """What the user asks for, and what this machine has, are two things."""

    @pytest.fixture(autouse=True)
    def _on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    @pytest.mark.parametrize("line", ["bf16: true", "fp16: true", "activation_offloading: true", "tf32: true"])
    def test_a_gpus_settings_are_read_without_one(self, config: Any, line: str) -> None:
        words = config(line + "\n")
        settings = parse(words, output_dir="x", nano={}, elsewhere=True)
        assert not settings.train.asks_cpu
        found = setup_of(settings.train, LlavaConfig(), Lora(8, 8), load_in_4bit=True)
        assert found.device == "cuda" and found.held is None
        assert found.dtype == (torch.float16 if line == "fp16: true" else torch.bfloat16)
        if line != "bf16: true":
            with pytest.raises(InputError):
                read(*words)

    def test_a_recipe_for_a_cpu_is_planned_as_one(self, config: Any) -> None:
        settings = parse(config("use_cpu: true\nbf16: true\n"), output_dir="x", nano={}, elsewhere=True)
        found = setup_of(settings.train, LlavaConfig(), Lora(8, 8), load_in_4bit=True)
        assert (found.device, found.dtype, found.held) == ("cpu", torch.bfloat16, torch.float32)

    def test_a_cpu_that_is_asked_for_is_not_set_by_the_card(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        train = TrainConfig(output_dir="x", use_cpu=True)
        assert train.asks_cpu and not train.bf16 and not train.fp16
        with pytest.raises(InputError, match="has already found a GPU. Start the program with CUDA_VISIBLE_DEVICES=''"):
            read("--use_cpu", "true")

    @pytest.mark.parametrize("asked", [True, False])
    def test_the_recipes_hide_the_gpus_from_a_run_on_the_cpu(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
    ) -> None:
        """Before anything could load the model onto one."""
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
            monkeypatch.setenv(name, "0")
        seen: list[str] = []
        monkeypatch.setattr(begin, "look", lambda given, stage1: None)
        monkeypatch.setattr(main, "main", lambda *_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]) or 0)
        words = ["--model_name_or_path", "nano", "--output_dir", str(tmp_path / "x")]
        assert begin.finetune([*words, "--use_cpu", str(asked).lower()]) == 0
        assert seen == ["" if asked else "0"]


@pytest.mark.parametrize("nano", [NANO_PRETRAIN, NANO_FINETUNE])
def test_nanos_own_values_are_settings(nano: dict[str, Any]) -> None:
    settings = read(nano=nano)
    train, model = settings.train, settings.model
    assert {name: getattr(model if hasattr(model, name) else train, name) for name in nano} == nano
    assert not train.activation_checkpointing


def test_yaml_numbers_as_people_write_them(config: Any) -> None:
    """YAML takes 2e-5 for text: it has no point."""
    settings = read(*config("learning_rate: 2e-5\nprojector_lr: 0.00002\nlora_r: 8\nload_in_4bit: false\n"))
    assert settings.train.learning_rate == settings.train.projector_lr == 2e-5
    assert settings.model.lora_r == 8 and settings.model.load_in_4bit is False


def test_a_setting_under_its_old_name(config: Any) -> None:
    """As the `run.yaml` of an older run has it."""
    assert read(*config("tokens_per_row: 900\n")).train.tokens_per_pack == 900


def test_config_with_an_equals_sign(config: Any) -> None:
    assert read(f"--config={config('lora_r: 3')[1]}").model.lora_r == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora_rank: 8", "unknown key 'lora_rank'; did you mean lora_r?"),
        ("learningrate: 1", "unknown key 'learningrate'; did you mean learning_rate?"),
        ("tokens_per_row: 1\ntokens_per_pack: 2", "recipe.yaml:1: tokens_per_row is the old name of tokens_per_pack"),
        ("zzz: 1", "unknown key 'zzz'; see --help for all names"),
        ("template: vicuna", "template is 'vicuna'. It must be one of plain, vicuna_v1"),
        ("too_long: cut", "too_long is 'cut'. It must be one of error, drop, trim"),
        ("- 1\n- 2", "`key: value` lines"),
        ("just words", "`key: value` lines"),
        ("1: 2", "`key: value` lines"),
        ("a: [1", "is not YAML"),
        ("eval_strategy: sometimes", "eval_strategy is 'sometimes'. It must be one of no, steps, epoch"),
        ("packing: true", "packing has no effect in qllava: qllava packs the samples itself"),
        ("resume_from_checkpoint: there", "resume_from_checkpoint has no effect"),
        ("push_to_hub: true", "push_to_hub has no effect in qllava: a run is not uploaded during"),
        ("lr_scheduler_kwargs: {x: 2024-13-45}", "is not YAML: month must be in 1..12"),
        ("dataloader_in_order: false\ndataloader_num_workers: 2", "dataloader_in_order has no effect"),
        ("fsdp: full_shard", "accelerate launch --config_file recipes/accelerate/fsdp2_qlora.yaml"),
        ("fsdp_config: {version: 2}", "fsdp_config has no effect"),
        ("data_seed: 3", "data_seed has no effect"),
        ("train_sampling_strategy: sequential", "train_sampling_strategy has no effect"),
    ],
)
def test_a_yaml_that_cannot_be_used(config: Any, text: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        read(*config(text))
    assert expected in refusal(caught.value)


def test_a_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read("--config", str(tmp_path / "none.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not YAML"):
        read("--config", str(tmp_path / "bytes.yaml"))


def test_a_wrong_flag_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["--lora_rank", "8"], ["--lora_r", "many"], ["--template", "vicuna"]):
        with pytest.raises(SystemExit) as caught:
            read(*line)
        assert caught.value.code == 2
    assert "did you mean --lora_r?" in capsys.readouterr().err


@pytest.mark.parametrize("line", [["--packing", "true"], ["--packing=true"], ["--padding_free", "true"]])
def test_flags_without_effect_are_refused(line: list[str]) -> None:
    with pytest.raises(InputError, match="has no effect in qllava"):
        read(*line)


def test_a_field_without_effect_may_be_given_its_default(config: Any) -> None:
    read(*config("packing: false\nassistant_only_loss: false\n"))


def test_every_field_of_ours_has_a_help() -> None:
    inherited = {own.name for own in dataclasses.fields(SFTConfig)}
    ours = [own for own in dataclasses.fields(TrainConfig) if own.name not in inherited]
    assert ours and all(own.metadata.get("help") for own in ours)


def test_nobody_is_warned_of_an_old_name(recwarn: pytest.WarningsRecorder) -> None:
    read()
    assert not [w for w in recwarn if issubclass(w.category, FutureWarning)]


def test_an_adapter_brings_all_that_its_base_is(tmp_path: Path) -> None:
    """What is recorded of the run is then true, and a setting that differs is refused instead of having no effect."""
    of_base = Recipe("m", None, None, "linear", -1, "squash", "chatml", False)
    save_record(of_base, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16}')
    found = read("--model_name_or_path", str(tmp_path)).model
    assert (found.lora_r, found.lora_alpha) == (8, 16)
    decides = {own.name for own in dataclasses.fields(Recipe)} & {own.name for own in dataclasses.fields(ModelConfig)}
    decides -= {"language_model", "vision_tower"}  # the base itself
    assert decides == set(BELONGS_TO_BASE)
    assert {name: getattr(found, name) for name in decides} == {name: getattr(of_base, name) for name in decides}
    for name, other in {"projector_type": "mlp2x_gelu", "image_aspect": "crop", "vision_feature_layer": "-2"}.items():
        settings = read("--model_name_or_path", str(tmp_path), f"--{name}", other)
        with pytest.raises(InputError, match=f"was trained with {name} {getattr(of_base, name)}. Remove the setting"):
            same_base(settings, tmp_path)


def test_several_cards_are_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise transformers puts torch's DataParallel around the model."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    train = read().train
    assert train.n_gpu == 1 and train.train_batch_size == train.per_device_train_batch_size
