"""Memory runs out: packs are halved, the step is computed again, and the gradients are those of all its samples."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from accelerate import data_loader
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from qllava.config import InputError
from qllava.data import collate
from qllava.data.formats import read_examples
from qllava.training import scores
from qllava.training.durable.checkpoints import computed_in
from qllava.training.main import main
from qllava.training.memory import rehearsal
from qllava.training.memory.fake import held_by
from qllava.training.memory.paged import keep_paged
from qllava.training.run import finetune
from qllava.training.step.packs import PackStep
from qllava.training.trainer import LlavaTrainer
from tests.small_memory import small_memory
from tests.tiny_runs import Tiny, bits, changed, make_trainer, refusal, stage2_settings
from tests.training.test_trainer import Gradients, assert_close, one_step


def small_card(trainer: LlavaTrainer, most: int) -> list[int]:
    """Let packs of more tokens run out of memory half way through the backward pass; returns the sizes that came by."""
    sizes: list[int] = []

    def check(_: Any, gradient: tuple[torch.Tensor, ...]) -> None:
        sizes.append(gradient[0].shape[1])
        if gradient[0].shape[1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    language_model: Any = trainer.assembled.model.model.language_model
    language_model.layers[0].register_full_backward_pre_hook(check)
    return sizes


def moments(trainer: LlavaTrainer) -> torch.Tensor:
    """What a rehearsal takes for the optimizer's state."""
    return rehearsal.moments(trainer.args.optimizer, trainer.optimizer, trainer.model, trainer.args.device)


class TestOutOfMemory:
    def test_the_step_is_computed_again_in_shorter_rows(self, tiny: Tiny, tmp_path: Path) -> None:
        same = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        loss, expected, _ = one_step(tiny, tmp_path / "a", **same)
        kept = Gradients()
        trainer = make_trainer(tiny, tmp_path / "b", callbacks=[kept], max_steps=1, max_grad_norm=0, **same)
        (tmp_path / "b").mkdir(exist_ok=True)
        sizes = small_card(trainer, 120)
        trainer.train()
        assert max(sizes) > 120 and sizes[-1] <= 120
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
        assert_close(expected, kept.steps[0], 1e-5)
        assert "Out of memory at step 1: from now on packs have at most" in (tmp_path / "b" / "ledger.txt").read_text()

    def test_rows_stay_short(self, tiny: Tiny, tmp_path: Path) -> None:
        trainer = make_trainer(tiny, tmp_path, per_device_train_batch_size=4, max_steps=2)
        sizes = small_card(trainer, 120)
        trainer.train()
        assert sum(size > 120 for size in sizes) == 1

    @pytest.mark.parametrize("workers", [0, 2])
    def test_every_image_is_decoded_as_often_as_without(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
    ) -> None:
        """Two epochs of two batches, memory runs out in the first; workers have made batches ahead by then."""
        opened = collate._open
        counts, lengths = [], []
        for most in (1 << 30, 120):
            folder, log = tmp_path / str(most), tmp_path / f"{most}.txt"
            folder.mkdir()

            def counted(id: str, path: str, log: Path = log) -> Image.Image:
                with log.open("a") as file:  # a worker has no other way to tell
                    file.write(path + "\n")
                return opened(id, path)

            monkeypatch.setattr(collate, "_open", counted)
            trainer = make_trainer(
                tiny, folder, per_device_train_batch_size=4, max_steps=4, dataloader_num_workers=workers
            )
            made: list[int] = []
            rows = trainer.pack_step.compute
            monkeypatch.setattr(
                trainer.pack_step,
                "compute",
                lambda model, batch, n, rows=rows, made=made: (
                    made.append(max(row["input_ids"].shape[1] for row in batch["packs"])) or rows(model, batch, n)
                ),
            )
            small_card(trainer, most)
            trainer.train()
            counts.append(sorted(log.read_text().split()))
            lengths.append(made)
        assert max(lengths[0]) > 120 and len(lengths[0]) == 4
        assert lengths[1][0] > 120 and max(lengths[1][1:]) <= 120 and len(lengths[1]) == 5
        assert counts[0] == counts[1] and len(counts[0]) >= 8

    @pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
    def test_workers_that_run_already_make_shorter_rows(self, tiny: Tiny, tmp_path: Path, context: str) -> None:
        trainer = make_trainer(tiny, tmp_path, per_device_train_batch_size=4)
        collator: Any = trainer.data_collator
        samples = [trainer.train_dataset[number] for number in range(4)]  # type: ignore[index]
        batches = DataLoader(
            samples,  # type: ignore[arg-type]
            batch_size=4,
            collate_fn=collator,
            num_workers=1,
            persistent_workers=True,
            multiprocessing_context=context,
        )

        def longest() -> int:
            (batch,) = batches
            return max(row["input_ids"].shape[1] for row in batch["packs"])

        before = longest()
        collator.shorten(120)
        assert before > 120 and longest() <= 120

    def test_batches_of_other_loaders_are_shorter_too(self, tiny: Tiny, tmp_path: Path) -> None:
        """Held-out batches, and those of a second call of train: all have the one collator."""
        trainer = make_trainer(tiny, tmp_path, per_device_train_batch_size=4, per_device_eval_batch_size=8, max_steps=1)
        held_out = trainer.get_eval_dataloader(trainer.train_dataset)
        small_card(trainer, 120)
        trainer.train()
        for loader in (held_out, trainer.get_train_dataloader()):
            assert max(row["input_ids"].shape[1] for batch in loader for row in batch["packs"]) <= 120

    def test_a_resumed_run_keeps_the_length(self, tiny: Tiny, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        saving = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(tiny, tmp_path / "run", max_steps=1, **saving)
        small_card(trainer, 120)
        trainer.train()
        kept = computed_in(tmp_path / "run" / "checkpoint-1")
        halved = trainer.pack_step.halved
        assert kept == {"on": "cpu in float32", "attention": "groups", "layers": "plain", "halved": halved}
        again = make_trainer(tiny, tmp_path / "again", max_steps=2, tokens_per_pack=300, kept=kept)
        sizes = small_card(again, 1 << 30)
        again.train()
        assert sizes and max(sizes) <= halved < 300  # type: ignore[operator]
        assert again.computed == kept, "its own checkpoints keep it too"

    def test_one_sample_is_too_much(self, tiny: Tiny, tmp_path: Path) -> None:
        trainer = make_trainer(tiny, tmp_path, per_device_train_batch_size=4, max_steps=2)
        before = bits(trainer.model)
        small_card(trainer, 10)
        with pytest.raises(InputError) as caught:
            trainer.train()
        assert "Out of memory at step 1 with a single sample of 72 tokens." in refusal(caught.value)
        assert not changed(before, trainer.model)

    def test_a_rehearsal_leaves_nothing_behind_but_shorter_rows(self, tiny: Tiny, tmp_path: Path) -> None:
        runs = []
        for rehearsed in (False, True):
            folder = tmp_path / str(rehearsed)
            folder.mkdir()
            trainer = make_trainer(tiny, folder, per_device_train_batch_size=4, lora_dropout=0.1, max_steps=2)
            if rehearsed:
                sizes = small_card(trainer, 150)
                before, state = bits(trainer.model), torch.get_rng_state()
                trainer.rehearse()
                assert not changed(before, trainer.model) and torch.equal(state, torch.get_rng_state())
                assert all(p.grad is None for p in trainer.model.parameters())
                assert max(sizes) > 150 and max(trainer.stage.train.lengths) == 78
                sizes.clear()
            trainer.train()
            runs.append((trainer.state.log_history, bits(trainer.model)))
        assert max(sizes) <= 150
        plain, rehearsed_log = (
            [{k: v for k, v in line.items() if "loss" in k or "tokens" in k} for line in log] for log, _ in runs
        )
        assert [line["loss"] for line in rehearsed_log[:2]] == pytest.approx(
            [line["loss"] for line in plain[:2]], rel=1e-3
        )

    def test_pixels_are_on_the_device_for_one_row_at_a_time(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All batches of an optimizer step are there at once; their pixels wait on the host."""
        moved: list[int] = []

        def images(data: Any) -> int:
            if isinstance(data, dict):
                own = len(data["pixel_values"]) if "pixel_values" in data else 0
                return own + sum(images(value) for value in data.values())
            return sum(map(images, data)) if isinstance(data, list) else 0

        sent, prepared = data_loader.send_to_device, LlavaTrainer._prepare_input
        monkeypatch.setattr(
            data_loader, "send_to_device", lambda data, *a, **k: moved.append(images(data)) or sent(data, *a, **k)
        )
        monkeypatch.setattr(
            LlavaTrainer, "_prepare_input", lambda own, data: moved.append(images(data)) or prepared(own, data)
        )
        steps: list[list[int]] = []
        compute = PackStep.compute

        def counted(own: PackStep, model: Any, batch: Any, number: Any) -> torch.Tensor:
            steps.append([images(row) for row in batch["packs"]])
            return compute(own, model, batch, number)

        monkeypatch.setattr(PackStep, "compute", counted)
        trainer = make_trainer(
            tiny,
            tmp_path,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=1,
            tokens_per_pack=80,
        )
        trainer.train()
        assert len(steps) == 2 and sum(map(sum, steps)) > max(map(max, steps))
        assert max(moved) == max(map(max, steps))
        moved.clear()
        batches = trainer.get_eval_dataloader(trainer.train_dataset)
        losses = [trainer.sums(trainer.model, batch)["loss"] for batch in batches]
        assert losses and max(moved) <= 2

    @pytest.mark.parametrize("images", [[0, 0, 5, 5, 0, 0], [0, 0, 0, 0, 0, 0], [5, 5, 5, 5, 5, 5]])
    def test_a_rehearsal_runs_the_tower(self, images: list[int]) -> None:
        """Where the longest samples are text alone, the longest with images are tried too."""
        tried = rehearsal.largest(np.array([9, 8, 3, 2, 1, 7]), np.array(images), 2)
        assert tried[0] == [1, 0]
        assert tried[1:] == ([[3, 2]] if set(images) == {0, 5} else [])

    def test_a_rehearsal_takes_the_optimizers_memory(self, tiny: Tiny, tmp_path: Path) -> None:
        trainer = make_trainer(tiny, tmp_path)
        shapes = [p.shape for p in trainer.model.parameters() if p.requires_grad]
        whole = 8 * sum(shape.numel() for shape in shapes)
        assert moments(trainer).numel() == whole
        trainer.args.optim = "adamw_bnb_8bit"
        assert moments(trainer).numel() == held_by("adamw_bnb_8bit", shapes) < whole

    def test_a_rehearsal_takes_only_what_the_optimizer_lacks(self, tiny: Tiny, tmp_path: Path) -> None:
        """A resumed run has loaded the state before the rehearsal."""
        trainer = make_trainer(tiny, tmp_path)
        optimizer = trainer.create_optimizer()
        learning = [p for group in optimizer.param_groups for p in group["params"]]
        assert moments(trainer).numel() == 8 * sum(p.numel() for p in learning)
        assert rehearsal.state_bytes(trainer.optimizer) == 0
        learning[0].grad = torch.ones_like(learning[0])
        optimizer.step()
        assert moments(trainer).numel() == 8 * sum(p.numel() for p in learning[1:])
        assert rehearsal.state_bytes(trainer.optimizer) == 8 * learning[0].numel() + 4  # and its number of steps
        optimizer.load_state_dict(optimizer.state_dict())
        for parameter in learning[1:]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert moments(trainer).numel() == 0

    def test_a_rehearsal_takes_the_share_of_this_rank(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As under FSDP (local shards) and ZeRO (the optimizer's own flat shards): not the model's whole tensors."""
        trainer = make_trainer(tiny, tmp_path)
        trainer.optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1000))])
        assert moments(trainer).numel() == 8000
        monkeypatch.setattr(rehearsal, "_local", lambda tensor: tensor[:250])
        assert moments(trainer).numel() == 2000


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError("Unable to allocate 3.1 GiB for an array"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_anywhere_is_one_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(_: Any) -> Path:
        raise error

    chosen: Any = None
    assert main(failing, lambda: chosen) == 1
    said = capsys.readouterr().err
    assert said.startswith("qllava: Out of memory") and said.count("\n") == 1 and "qllava plan" in said
    with pytest.raises(RuntimeError, match="shapes"):
        main(lambda _: (_ for _ in ()).throw(RuntimeError("mat1 and mat2 shapes")), lambda: chosen)


@pytest.mark.parametrize("kind", [bnb.optim.AdamW8bit, bnb.optim.AdamW32bit, bnb.optim.Lion8bit])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported")
def test_a_paged_optimizer_comes_back_paged(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA nothing is paged, so a stand-in marks what the optimizer's own paged allocation returns."""
    plain = kind.get_state_buffer

    def paged(optimizer: Any, parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        made: torch.Tensor = plain(optimizer, parameter, dtype)
        made.is_paged = parameter.numel() >= 1e5  # type: ignore[attr-defined]
        return made

    def step(optimizer: Any, parameter: Any, seed: int) -> None:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    def begun() -> tuple[Any, Any]:
        parameter = torch.nn.Parameter(torch.ones(400, 300))
        optimizer = kind([parameter], lr=0.1)
        optimizer.is_paged = True
        keep_paged(optimizer)
        return parameter, optimizer

    monkeypatch.setattr(kind, "get_state_buffer", paged)
    monkeypatch.setattr(bnb.functional, "prefetch_tensor", lambda tensor: None)
    (parameter, optimizer), (other, resumed) = begun(), begun()
    step(optimizer, parameter, 0)
    with torch.no_grad():
        other.copy_(parameter)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    moments = [value for name, value in resumed.state[other].items() if name in ("state1", "state2")]
    assert moments and all(getattr(moment, "is_paged", False) for moment in moments)
    for name, value in optimizer.state[parameter].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state[other][name])), name
    step(optimizer, parameter, 1)
    step(resumed, other, 1)
    assert torch.equal(parameter, other)


class TestAnswers:
    def test_a_run_answers_in_halves_and_scores_the_same(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before the first step, at an evaluation, and after the last step."""
        sizes = small_memory(monkeypatch, 3)
        folder = finetune(stage2_settings(tiny, tmp_path / "run"))
        assert max(sizes) == 8 and set(sizes) == {8, 4, 2}
        # One room for all answers before and after, and one for the evaluations: each meets the limit once.
        assert sizes.count(8) == 2
        for name in ("samples.json", "before.json"):
            assert (folder / name).read_bytes() == (tiny.stage2 / name).read_bytes()
        found, expected = (
            json.loads((place / "results.json").read_text(encoding="utf-8")) for place in (folder, tiny.stage2)
        )
        assert found["eval_exact_match"] == expected["eval_exact_match"]

    def test_one_question_that_does_not_fit_ends_the_run_in_one_sentence(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small_memory(monkeypatch, 0)
        with pytest.raises(InputError) as caught:
            finetune(stage2_settings(tiny, tmp_path / "run"))
        assert "Not enough memory to answer the question at rows.json, example" in refusal(caught.value).replace(
            f"{tiny.rows.parent}/", ""
        )

    def test_what_fit_memory_leaves_bounds_the_batches(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = make_trainer(tiny, tmp_path)
        examples, config = read_examples(tiny.rows, tiny.rows.parent), trainer.args
        sizes = small_memory(monkeypatch, 100)
        found = []
        for limit in (None, "1MB", "0.1MB"):
            sizes.clear()
            config.fit_memory = limit
            room = scores.room_for(config)
            found.append(scores.answers(trainer.model, trainer.assembled, examples, room))
            assert sum(sizes) == 8
            assert sizes == [8] if limit is None else sizes == [1] * 8 if limit == "0.1MB" else 1 < max(sizes) < 8
        assert found[0] == found[1] == found[2]
