"""The trainer on real tiny models: what learns, in which type, at which rate; equal losses; NaN; checkpoints."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from qllava.config import InputError
from qllava.data.collate import Collator
from qllava.models import outline as parts
from qllava.models.adapter import load_run, projector_state
from qllava.runs import Run
from qllava.training.callbacks import Metrics
from qllava.training.durable.checkpoints import saving
from qllava.training.trainer import LlavaTrainer
from tests.tiny_runs import Tiny, bits, changed, make_trainer, refusal, write_records


class Gradients(TrainerCallback):
    """Keeps the gradients of each step as the optimizer is about to take them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})


def one_step(tiny: Tiny, folder: Path, **fields: Any) -> tuple[float, dict[str, torch.Tensor], LlavaTrainer]:
    """Loss and unclipped gradients of one step over all eight packs, through the whole loop."""
    kept = Gradients()
    trainer = make_trainer(tiny, folder, callbacks=[kept], max_steps=1, max_grad_norm=0, **fields)
    trainer.train()
    return trainer.state.log_history[0]["loss"], kept.steps[0], trainer


@pytest.fixture(scope="module")
def usual_step(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Any]:
    """What `one_step` gives for a stage (with LoRA or without) whose switches are as usual; computed once."""

    @cache
    def step(lora: bool) -> tuple[float, dict[str, torch.Tensor], LlavaTrainer]:
        return one_step(tiny, tmp_path_factory.mktemp("usual"), per_device_train_batch_size=8, lora=lora)

    return step


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys() and a
    for name, tensor in a.items():
        if "lora_A" not in name:  # B is 0 before the first step, and so is the gradient of every A
            assert tensor.abs().max() > 0, name
        assert (tensor - b[name]).norm() <= tolerance * (1e-30 + tensor.norm()), name


class TestWhatLearns:
    def test_stage_2(self, tiny: Tiny, tmp_path: Path) -> None:
        trainer = make_trainer(tiny, tmp_path, max_steps=2)
        model: Any = trainer.model
        before = bits(model)
        trainer.train()
        touched = changed(before, model)
        after = model.state_dict()
        b = {name for name in after if "lora_B" in name}
        a = {name for name in after if "lora_A" in name}
        projector = {name for name in after if "multi_modal_projector.modules_to_save" in name}
        assert len(b) == 2 * 7 and len(a) == 2 * 7 and len(projector) == 4
        assert all("model.language_model.layers." in name for name in after if "lora_" in name)
        assert b <= touched
        assert touched <= a | b | projector  # tower, base, scales of the base, head: bit for bit what they were
        moved = sum(int((before[name] != after[name]).sum()) for name in projector)
        assert moved >= 0.99 * sum(before[name].numel() for name in projector)

    def test_stage_1(self, tiny: Tiny, tmp_path: Path) -> None:
        trainer = make_trainer(tiny, tmp_path, lora=False, max_steps=2, learning_rate=1e-3)
        before = bits(trainer.model)
        trainer.train()
        prefix = "model.multi_modal_projector."
        layers = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
        assert changed(before, trainer.model) == {prefix + name for name in layers}

    @pytest.mark.parametrize("lora", [True, False], ids=["stage 2", "stage 1"])
    def test_a_linear_projector_keeps_its_identity(self, tiny: Tiny, tmp_path: Path, lora: bool) -> None:
        trainer = make_trainer(tiny, tmp_path, lora=lora, max_steps=2, recipe=tiny.recipe(projector_type="linear"))
        before = {name: tensor.clone() for name, tensor in projector_state(trainer.model).items()}
        trainer.train()
        after = projector_state(trainer.model)
        assert torch.equal(after["linear_2.weight"], torch.eye(64))
        assert torch.equal(after["linear_2.bias"], torch.zeros(64))
        assert (before["linear_1.weight"] != after["linear_1.weight"]).float().mean() > 0.99
        assert trainer.model.config.projector_hidden_act == "linear"

    def test_masters_are_fp32_and_rates_are_two(self, tiny: Tiny, tmp_path: Path) -> None:
        trainer = make_trainer(tiny, tmp_path)
        learning = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in learning.values()} == {torch.float32}
        groups = trainer.create_optimizer().param_groups
        assert [group["lr"] for group in groups] == [2e-4, 2e-5]
        assert [group["weight_decay"] for group in groups] == [0, 0]
        by_group = [{id(p) for p in group["params"]} for group in groups]
        assert by_group[0] == {id(p) for name, p in learning.items() if "lora_" in name}
        assert by_group[1] == {id(p) for name, p in learning.items() if "multi_modal_projector" in name}

    def test_stage_1_has_one_rate(self, tiny: Tiny, tmp_path: Path) -> None:
        trainer = make_trainer(tiny, tmp_path, lora=False, learning_rate=1e-3, projector_lr=None, weight_decay=0.1)
        (group,) = trainer.create_optimizer().param_groups
        assert (group["lr"], group["weight_decay"], len(group["params"])) == (1e-3, 0.1, 4)


class TestTheSameNumbers:
    def test_with_and_without_checkpointing(self, tiny: Tiny, tmp_path: Path) -> None:
        plain, expected, _ = one_step(tiny, tmp_path / "a", gradient_checkpointing=False)
        loss, found, trainer = one_step(tiny, tmp_path / "b", gradient_checkpointing=True)
        layers = trainer.model.base_model.model.model.language_model.layers
        assert all(layer.gradient_checkpointing for layer in layers)
        assert loss == pytest.approx(plain, rel=1e-6)
        assert_close(expected, found, 1e-6)

    def test_the_tower_is_outside_the_graph(self, tiny: Tiny, tmp_path: Path) -> None:
        trainer = make_trainer(tiny, tmp_path, max_steps=1, gradient_checkpointing=True)
        inner = trainer.model.base_model.model.model
        seen: list[bool] = []
        inner.vision_tower.encoder.layers[0].register_forward_hook(
            lambda module, inputs, output: seen.append(torch.is_grad_enabled())
        )
        fed: list[torch.Tensor] = []
        inner.multi_modal_projector.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
        trainer.train()
        assert seen == [False]  # once: nothing of it is computed again on the way back
        assert len(fed) == 1 and not fed[0].requires_grad

    def test_a_batch_of_8_equals_4_times_2(self, tiny: Tiny, tmp_path: Path) -> None:
        whole, expected, _ = one_step(tiny, tmp_path / "a", per_device_train_batch_size=8)
        loss, found, trainer = one_step(
            tiny, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4
        )
        learned = [
            sum(label != -100 for row in trainer.train_dataset.select(range(i, i + 2)) for label in row["labels"])
            for i in range(0, 8, 2)
        ]
        assert len(set(learned)) > 1, "equal counts would hide a mean of means"
        assert loss == pytest.approx(whole, rel=1e-5)
        assert_close(expected, found, 1e-5)

    @pytest.mark.parametrize("lora", [True, False], ids=["stage 2", "stage 1"])
    @pytest.mark.parametrize(
        "changes",
        [
            {"tokens_per_pack": 100},
            {"share_image_prefix": False},
            {"stop_tower": False},
            {"prune_last_layer": False},
            {"lora_first": False},
            {"gradient_checkpointing": False},
            pytest.param(
                {"compile_layers": True},
                marks=pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
            ),
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_a_switch_changes_nothing(
        self, tiny: Tiny, usual_step: Callable[[bool], Any], tmp_path: Path, changes: dict[str, Any], lora: bool
    ) -> None:
        loss, expected, trainer = usual_step(lora)
        other, found, changed_one = one_step(tiny, tmp_path, per_device_train_batch_size=8, lora=lora, **changes)
        assert other == pytest.approx(loss, rel=1e-5)
        assert_close(expected, found, 1e-5)
        rows = [len(next(iter(t.get_train_dataloader()))["packs"]) for t in (trainer, changed_one)]
        assert rows[0] == 1 and (rows[1] > 1) is ("tokens_per_pack" in changes)

    @pytest.mark.parametrize("lora", [True, False], ids=["stage 2", "stage 1"])
    def test_a_row_of_texts_gives_the_projector_a_gradient_of_zero(
        self, tiny: Tiny, tmp_path: Path, lora: bool
    ) -> None:
        turns = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "two"}]
        write_records(tiny.rows.with_name("texts.json"), [{"id": f"t{n}", "conversations": turns} for n in range(2)])
        kept = Gradients()
        texts = dataclasses.replace(tiny, rows=tiny.rows.with_name("texts.json"))
        make_trainer(texts, tmp_path, lora=lora, callbacks=[kept], max_steps=1, max_grad_norm=0).train()
        projector = {name: g for name, g in kept.steps[0].items() if "multi_modal_projector" in name}
        assert len(projector) == 4 and not any(g.any() for g in projector.values())
        assert (len(kept.steps[0]) > 4) is lora

    def test_captions_of_one_image_share_it(self, tiny: Tiny, tmp_path: Path) -> None:
        """Where a caption follows its image at once, the last image token and its feature are repeated."""
        rows = [
            {"id": f"c{n}", "image": f"{n % 2}.png", "conversations": [{"from": "gpt", "value": text}]}
            for n, text in enumerate(("red", "a circle", "one", "green", "two"))
        ]
        for row in rows:
            row["conversations"].insert(0, {"from": "human", "value": "<image>"})  # type: ignore[attr-defined]
        write_records(tiny.rows.with_name("shared_captions.json"), rows)
        captions = dataclasses.replace(tiny, rows=tiny.rows.with_name("shared_captions.json"))
        recipe = tiny.recipe(template="plain")
        results = [
            one_step(captions, tmp_path / str(share), lora=False, recipe=recipe, share_image_prefix=share,
                     per_device_train_batch_size=5)
            for share in (True, False)
        ]  # fmt: skip
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
        assert_close(results[0][1], results[1][1], 1e-5)
        sizes = [
            next(iter(trainer.get_train_dataloader()))["packs"][0]["input_ids"].shape[1] for *_, trainer in results
        ]
        assert sizes[0] < sizes[1]


class TestSixteenBit:
    """What a GPU computes in, here on the CPU: a bf16 base, fp32 masters, autocast in training and none in answers."""

    def test_trains_answers_and_loads_the_same(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parts, "compute_dtype", lambda: torch.bfloat16)
        trainer = make_trainer(tiny, tmp_path / "run", max_steps=2, bf16=True, use_cpu=True, save_strategy="steps")
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
        trainer.train()
        processor = trainer.assembled.processor
        batch = Collator(processor.tokenizer.pad_token_id, processor.image_processor)([trainer.train_dataset[0]])
        batch.pop("ids")
        trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()  # without autocast
        with torch.no_grad():
            expected = trained(**batch).logits
        monkeypatch.undo()  # the folder is carried to a machine that would compute in fp32
        model, _ = load_run(tmp_path / "run" / "checkpoint-2")
        with torch.no_grad():
            found = model(**batch).logits
        assert model.model.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(found, expected)


class TestCheckpoints:
    def test_holds_what_it_takes_to_continue_and_to_load(self, tiny: Tiny) -> None:
        names = {p.name for p in (tiny.stage2 / "checkpoint-2").iterdir()}
        assert names >= {
            "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "projector.safetensors", "qllava.json",
            "rng_state.pth", "scheduler.pt", "tokenizer.json", "trainer_state.json",
        }  # fmt: skip
        stage1 = {p.name for p in (tiny.stage1 / "checkpoint-2").iterdir()}
        assert stage1 >= {"optimizer.pt", "projector.safetensors", "qllava.json", "rng_state.pth", "trainer_state.json"}
        assert not any(name.startswith(("adapter_", "model.", "pytorch_model")) for name in stage1)

    def test_the_limit_keeps_the_newest(self, tiny: Tiny, tmp_path: Path) -> None:
        trainer = make_trainer(tiny, tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
        trainer.train()
        assert [p.name for p in Run(tmp_path).checkpoints()] == ["checkpoint-3", "checkpoint-4"]
        assert trainer.args.save_total_limit == 2

    def test_a_folder_that_is_not_whole_bears_another_name(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Killed while saving: what was there is whole, and the rest is cleared away by the next save."""
        trainer = make_trainer(tiny, tmp_path, save_strategy="steps", save_steps=1)

        def killed(self: Any, folder: str) -> None:
            if self.state.global_step == 2:
                monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # a killed process clears nothing
                raise KeyboardInterrupt

        monkeypatch.setattr(LlavaTrainer, "_save_rng_state", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        monkeypatch.undo()
        assert [p.name for p in Run(tmp_path).checkpoints()] == ["checkpoint-1"]
        assert sorted(p.name for p in tmp_path.iterdir()) == [".partial", "checkpoint-1"]
        trainer._save_checkpoint(trainer.model, None)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]

    def test_order_is_by_number(self, tmp_path: Path) -> None:
        for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "checkpoint-9.tmp"):
            (tmp_path / name).mkdir()
        assert [p.name for p in Run(tmp_path).checkpoints()] == ["checkpoint-9", "checkpoint-10"]


@pytest.fixture
def small_files() -> Iterator[Any]:
    """Call it, and from then on no file may grow over so many bytes: a disk that is full, without being root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1_000, 20_000, 60_000], ids=["adapter", "projector", "optimizer"])
def test_a_full_disk_leaves_the_former_checkpoint(tiny: Tiny, tmp_path: Path, small_files: Any, size: int) -> None:
    """safetensors, torch and Python each have an error of their own; the sentence is one."""
    trainer = make_trainer(tiny, tmp_path, save_strategy="steps", save_steps=1)

    class Fill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                small_files(size)

    trainer.add_callback(Fill())
    before = {}

    class Keep(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before.update({p.name: p.read_bytes() for p in (tmp_path / "checkpoint-1").iterdir()})

    trainer.add_callback(Keep())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(InputError) as caught:
            trainer.train()
    finally:
        # Before pytest writes its next dot: its own output may be a file that is larger.
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "checkpoint-2 could not be saved" in refusal(caught.value)
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoint-1").iterdir()} == before and before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_saving_lets_other_errors_pass() -> None:
    with pytest.raises(KeyError), saving("x"):
        raise KeyError("a fault of ours")


def test_metrics_are_lines_of_json(tmp_path: Path) -> None:
    class State:
        global_step, max_steps = 3, 10

    metrics = Metrics(tmp_path / "metrics.jsonl", "finetune")
    metrics.on_log(None, State, None, {"loss": 1.5, "note": "text"})
    metrics.on_log(None, State, None, {"eval_loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"stage": "finetune", "step": 3, "total_steps": 10, "loss": 1.5},
        {"stage": "finetune", "step": 3, "total_steps": 10, "eval_loss": 2.0},
    ]
