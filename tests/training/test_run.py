"""Whole runs: one command, one folder; interrupted and given again; both ways to a model; what is written."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from qllava.config import InputError
from qllava.models.adapter import load_run, read_record
from qllava.training import scores
from qllava.training.callbacks import Progress
from qllava.training.durable.checkpoints import fault
from qllava.training.main import main
from qllava.training.run import finetune, pretrain
from qllava.training.scores import spaced
from qllava.training.settings import Settings
from tests.models.test_assemble import every_linear_of_the_language_model, quantized
from tests.tiny_models import make_tiny_model, make_tiny_processor
from tests.tiny_runs import Tiny, make_trainer, refusal, settings, stage1_settings, stage2_settings, write_records

Start = Callable[[Tiny, Path], Settings]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a folder's safetensors."""
    return {f"{p.name}/{k}": t for p in sorted(folder.glob("*.safetensors")) for k, t in load_file(p).items()}


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool((a == b).all()) if hasattr(a, "all") else a == b


class TestContinuing:
    """A run that was interrupted after its first checkpoint ends with the same bits."""

    @pytest.mark.parametrize(
        ("stage", "run", "start"),
        [("stage1", pretrain, stage1_settings), ("stage2", finetune, stage2_settings)],
        ids=["stage 1", "stage 2"],
    )
    def test_bit_for_bit(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, run: Any, start: Start
    ) -> None:
        whole, folder = getattr(tiny, stage), tmp_path / "run"
        on_step_end = Progress.on_step_end

        def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_step_end(self, args, state, control, **kwargs)
            if state.global_step == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(Progress, "on_step_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(start(tiny, folder))
        monkeypatch.undo()
        assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-2"]
        assert not (folder / "results.json").exists()
        torch.manual_seed(77)  # another process is in another random state
        run(start(tiny, folder))
        for place in (".", "checkpoint-4"):
            expected, found = tensors(whole / place), tensors(folder / place)
            assert "projector.safetensors/linear_1.weight" in expected
            assert stage == "stage1" or any("lora_B" in name for name in expected)
            assert same(expected, found), place
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            states = (torch.load(place / "checkpoint-4" / name, weights_only=False) for place in (whole, folder))
            assert same(*states), name
        metrics = [m for m in lines(folder) if "loss" in m and m["step"] == 4]
        wanted = [m for m in lines(whole) if "loss" in m and m["step"] == 4]
        assert [m["loss"] for m in metrics] == [m["loss"] for m in wanted]

    def test_an_evaluation_that_fails_costs_no_step(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The checkpoint of its step is saved before it, and the run resumes behind it with the same bits."""
        folder, asked = tmp_path / "run", []

        def fails(*arguments: Any, **named: Any) -> float:
            asked.append(named)
            torch.rand(7), random.random(), np.random.rand()  # an evaluation may draw
            raise InputError("Memory does not suffice.")

        monkeypatch.setattr(scores, "exact_match", fails)
        with pytest.raises(InputError, match=r"Memory does not suffice\."):
            finetune(stage2_settings(tiny, folder))
        assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-2"] and len(asked) == 1
        assert same(tensors(folder / "checkpoint-2"), tensors(tiny.stage2 / "checkpoint-2"))
        monkeypatch.undo()
        # The same command resumes after step 2, and does not evaluate it again.
        finetune(stage2_settings(tiny, folder))
        evaluated = [line["step"] for line in lines(folder) if "eval_loss" in line]
        assert set(evaluated) == {4}
        for place in (".", "checkpoint-4"):
            assert same(tensors(tiny.stage2 / place), tensors(folder / place))
        states = (torch.load(f / "checkpoint-4" / "rng_state.pth", weights_only=False) for f in (tiny.stage2, folder))
        assert same(*states)

    @pytest.mark.parametrize(
        ("fields", "orders"),
        [
            ({}, ["saved", "evaluated"]),
            ({"metric_for_best_model": "loss"}, ["saved", "evaluated", "saved"]),
            ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ["saved", "evaluated", "saved"]),
            ({"save_strategy": "best", "metric_for_best_model": "loss"}, ["evaluated", "saved"]),
        ],
        ids=str,
    )
    def test_what_is_saved_before_an_evaluation_and_after(
        self, tiny: Tiny, tmp_path: Path, fields: dict[str, Any], orders: list[str]
    ) -> None:
        order: list[str] = []

        class Order(TrainerCallback):
            def on_save(self, *_: Any, **__: Any) -> None:
                order.append("saved")

            def on_evaluate(self, *_: Any, **__: Any) -> None:
                order.append("evaluated")

        steps = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 1}
        values = {"save_strategy": "steps", "lr_scheduler_type": "constant", **steps, **fields}
        trainer = make_trainer(tiny, tmp_path, callbacks=[Order()], **values)
        trainer.train()
        assert order == orders
        assert fault(tmp_path / "checkpoint-1") is None
        state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text(encoding="utf-8"))
        assert (state["best_metric"] is None) == (fields == {})

    def test_an_alignment_of_its_own_is_continued_too(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """finetune_lora with pretrain_file, interrupted in each of its stages."""
        captions = write_records(
            tmp_path / "captions.json",
            [
                {"image": str(tiny.rows.parent / f"{i}.png"), "conversations": [
                    {"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"{colour} square"}]}
                for i, colour in enumerate(("red", "green", "blue", "yellow"))
            ],
        )  # fmt: skip

        def start(folder: Path) -> Settings:
            return settings(
                tiny, folder, pretrain_file=captions, image_folder=tiny.rows.parent, max_steps=3, save_steps=1
            )

        whole = finetune(start(tmp_path / "whole"))
        on_step_end = Progress.on_step_end

        for title in ("Stage 1", "Stage 2"):

            def interrupted(self: Any, args: Any, state: Any, control: Any, title: str = title, **kwargs: Any) -> None:
                on_step_end(self, args, state, control, **kwargs)
                if self.title == title and state.global_step == 2:
                    raise KeyboardInterrupt

            monkeypatch.setattr(Progress, "on_step_end", interrupted)
            with pytest.raises(KeyboardInterrupt):
                finetune(start(tmp_path / "run"))
            told = tmp_path / "run" / "command.json"
            content = json.loads(told.read_text(encoding="utf-8"))
            told.write_text(json.dumps({**content, "seconds": content["seconds"] + 1000}), encoding="utf-8")
        monkeypatch.undo()
        folder = finetune(start(tmp_path / "run"))
        seconds = [json.loads((f / "results.json").read_text())["seconds"] for f in (folder / "stage1", folder)]
        assert 1000 < seconds[0] < 2000 < seconds[1], "those of all starts, up to the end of each stage"
        for place in ("stage1", "."):
            assert same(tensors(whole / place), tensors(folder / place))
        stages = [line["stage"] for line in lines(folder)]
        assert "pretrain" in stages and "finetune" in stages

    def test_computes_as_its_checkpoint_did(self, tiny: Tiny, tmp_path: Path) -> None:
        shutil.copytree(tiny.stage2, tmp_path / "run")
        (tmp_path / "run" / "results.json").unlink()
        manifest = tmp_path / "run" / "checkpoint-4" / "manifest.json"
        content = json.loads(manifest.read_text(encoding="utf-8"))
        assert content["computed"] == {"on": "cpu in float32", "attention": "groups", "layers": "plain", "halved": None}
        content["computed"]["halved"] = 80
        manifest.write_text(json.dumps(content), encoding="utf-8")
        folder = finetune(stage2_settings(tiny, tmp_path / "run"))
        assert "packs have at most 80 tokens, because memory ran out" in (folder / "ledger.txt").read_text()

    def test_on_another_base_is_refused(self, tiny: Tiny, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        shutil.copytree(tiny.stage2, folder)
        (folder / "results.json").unlink()
        before = tensors(folder / "checkpoint-4")
        with pytest.raises(InputError) as caught:
            finetune(stage2_settings(tiny, folder, load_in_4bit=False))
        assert "load_in_4bit was True and is False" in refusal(caught.value)
        assert same(before, tensors(folder / "checkpoint-4"))

    def test_a_finished_run_is_refused(self, tiny: Tiny, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        shutil.copytree(tiny.stage1, folder)
        files = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        with pytest.raises(InputError, match="contains a finished run"):
            pretrain(stage1_settings(tiny, folder))
        assert files == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        (folder / "old.txt").touch()
        pretrain(stage1_settings(tiny, folder, overwrite_output_dir="true", max_steps=1, save_strategy="no"))
        assert not (folder / "old.txt").exists() and not list(folder.glob("checkpoint-*"))

    def test_an_unfinished_run_goes_on_though_it_may_overwrite(
        self, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A scheduler gives the same command again."""
        folder = tmp_path / "run"
        shutil.copytree(tiny.stage1, folder)
        (folder / "results.json").unlink()
        pretrain(stage1_settings(tiny, folder, overwrite_output_dir="true"))
        assert f"Resuming from {folder / 'checkpoint-4'}." in capsys.readouterr().out

    def test_a_folder_that_is_no_run_is_not_emptied(self, tiny: Tiny, tmp_path: Path) -> None:
        for name in ("results.json", "thesis.tex"):
            (tmp_path / name).touch()
        with pytest.raises(InputError, match="is not a run: it has results.json"):
            pretrain(stage1_settings(tiny, tmp_path, overwrite_output_dir="true"))
        assert (tmp_path / "thesis.tex").exists()

    def test_killed_while_it_is_overwritten(self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "run"
        shutil.copytree(tiny.stage1, folder)

        remove, removed = shutil.rmtree, list[Path]()

        def killed(path: Path) -> None:
            if removed:
                raise KeyboardInterrupt
            removed.append(path)
            remove(path)

        chosen = stage1_settings(tiny, folder, overwrite_output_dir="true", max_steps=1, save_strategy="no")
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", killed)
            with pytest.raises(KeyboardInterrupt):
                pretrain(chosen)
        assert removed[0].name.startswith("checkpoint-") and not removed[0].exists()
        with pytest.raises(InputError, match="contains a finished run"):
            pretrain(stage1_settings(tiny, folder))
        pretrain(chosen)
        assert not list(folder.glob("checkpoint-*")) and (folder / "results.json").is_file()


class TestFolder:
    def test_holds_what_is_promised(self, tiny: Tiny) -> None:
        names = {p.name for p in tiny.stage2.iterdir()}
        assert names >= {
            "adapter_config.json", "adapter_model.safetensors", "checkpoint-2", "checkpoint-4", "ledger.txt",
            "metrics.jsonl", "probes.safetensors", "projector.safetensors", "qllava.json", "report.html",
            "before.json", "command.json", "results.json", "run.yaml", "samples.json", "tokenizer.json",
        }  # fmt: skip
        assert not [name for name in names if name.startswith(".")]
        kept = set(load_file(tiny.stage2 / "adapter_model.safetensors"))
        assert sum("multi_modal_projector" in name for name in kept) == 4
        assert sum("lora_" in name for name in kept) == 2 * 2 * 7

    def test_run_yaml_gives_the_same_run(self, tiny: Tiny) -> None:
        written = yaml.safe_load((tiny.stage2 / "run.yaml").read_text(encoding="utf-8"))
        assert written["language_model"] == str(tiny.language_model)
        assert (written["lora_r"], written["max_steps"], written["eval_steps"]) == (4, 4, 2)
        assert (written["load_in_4bit"], written["template"]) == (True, "chatml")

    def test_metrics_results_and_samples(self, tiny: Tiny) -> None:
        written = lines(tiny.stage2)
        assert [m["step"] for m in written if "loss" in m] == [1, 2, 3, 4]
        assert all(m["total_steps"] == 4 and m["stage"] == "finetune" for m in written)
        assert {m["step"] for m in written if "eval_loss" in m and "eval_exact_match" in m} == {2, 4}
        results = json.loads((tiny.stage2 / "results.json").read_text(encoding="utf-8"))
        assert results.keys() == {"seconds", "eval_loss", "eval_exact_match", "n", "ci95", "tokens_per_second"}
        low, high = results["ci95"]
        assert results["n"] == 8 and low <= results["eval_exact_match"] <= high and high - low > 0.1
        exact = [m for m in written if "eval_exact_match" in m]
        assert all(m["eval_exact_match_n"] == 8 and "eval_exact_match_low" in m for m in exact)
        samples = json.loads((tiny.stage2 / "samples.json").read_text(encoding="utf-8"))
        assert len(samples) == 8 and all(s.keys() == {"image", "question", "truth", "before", "after"} for s in samples)
        assert samples[1]["question"] == "What colour is it?" and samples[1]["truth"] == "green"

    def test_record_names_the_base(self, tiny: Tiny) -> None:
        record = read_record(tiny.stage2)
        assert record == read_record(tiny.stage2 / "checkpoint-2")
        assert (record.language_model, record.vision_tower) == (str(tiny.language_model), str(tiny.tower))
        assert record.template == "chatml" and record.load_in_4bit and record.fingerprint

    def test_the_last_lines_name_the_next_commands(
        self, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "run"
        chosen = stage2_settings(tiny, folder, max_steps=1, eval_strategy="no", save_strategy="no")
        assert main(finetune, lambda: chosen) == 0
        captured = capsys.readouterr()
        last = [line.split()[:3] for line in captured.out.splitlines()[-3:]]
        assert last == [
            ["qllava", "chat", str(folder)],
            ["qllava", "merge", str(folder)],
            ["python", "demo/app.py", "--model"],
        ]
        said = captured.out[captured.out.index("\nResult\n") :]
        for label in ("Held-out accuracy", "Held-out loss", "Time", "Training speed", "Command", "Versions"):
            assert f"  {label} " in said
        assert " of 8 questions, exact match (95 % interval " in said
        assert "Stage 2: 100%" in captured.err and captured.err.count("1/1") >= 1
        assert "{'loss'" not in captured.out + captured.err  # transformers' own report beside our bar


def test_the_same_data_in_another_place_gives_the_same_run(tiny: Tiny, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in [tiny.rows, *tiny.rows.parent.glob("*.png")]:
        shutil.copy(path, elsewhere)
    torch.rand(3)  # nor does it matter what the process drew before
    folder = pretrain(stage1_settings(tiny, tmp_path / "run", train_file=elsewhere / tiny.rows.name))
    assert same(load_file(folder / "projector.safetensors"), load_file(tiny.stage1 / "projector.safetensors"))


class TestFitMemory:
    def test_chooses_and_says_so(self, tiny: Tiny, tmp_path: Path) -> None:
        folder = finetune(stage2_settings(tiny, tmp_path / "run", fit_memory="2GB", per_device_train_batch_size=8))
        ledger = (folder / "ledger.txt").read_text(encoding="utf-8")
        assert (
            "memory: " in ledger
            and "expected peak" in ledger
            and "of 2.0 GB" in ledger
            and "0 layers recomputed" in ledger
        )

    def test_refuses_what_cannot_fit(self, tiny: Tiny, tmp_path: Path) -> None:
        with pytest.raises(InputError) as caught:
            pretrain(stage1_settings(tiny, tmp_path / "run", fit_memory="0.5MB"))
        assert "more than the" in refusal(caught.value)

    def test_a_sample_that_is_longer_than_a_row(self, tiny: Tiny, tmp_path: Path) -> None:
        with pytest.raises(InputError) as caught:
            pretrain(stage1_settings(tiny, tmp_path / "run", tokens_per_pack=40))
        assert "has 78 tokens, but tokens_per_pack is 40. Raise tokens_per_pack to 78" in refusal(caught.value)

    def test_a_sample_that_is_longer_than_what_the_model_sees(self, tiny: Tiny, tmp_path: Path) -> None:
        shutil.copytree(tiny.language_model, tmp_path / "llama")
        path = tmp_path / "llama" / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 30}
        path.write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(InputError) as caught:
            pretrain(stage1_settings(tiny, tmp_path / "run", language_model=tmp_path / "llama"))
        assert "attention window of this language model has 30" in refusal(caught.value)

    def test_layers_are_recomputed_as_asked(self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kept: list[Any] = []
        monkeypatch.setattr(Progress, "on_train_end", lambda *args, **kwargs: kept.append(kwargs["model"]))
        quick = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
        finetune(stage2_settings(tiny, tmp_path / "run", recompute_layers=1, **quick))
        layers = kept[0].get_base_model().model.language_model.layers
        assert [layer.gradient_checkpointing for layer in layers] == [True, False]


class TestTheModelOfAFolder:
    def test_the_projector_starts_where_stage_1_ended(self, tiny: Tiny, tmp_path: Path) -> None:
        chosen = stage2_settings(tiny, tmp_path / "run", max_steps=1, learning_rate=0, projector_lr=0)
        folder = finetune(chosen)
        name = "projector.safetensors"
        assert same(load_file(tiny.stage1 / name), load_file(folder / name))

    def test_is_what_was_trained(self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`load_run` gives the very logits of the model in memory."""
        kept: list[Any] = []

        class Keep(TrainerCallback):
            def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                kept.append(kwargs["model"])

        monkeypatch.setattr(Progress, "on_train_end", Keep.on_train_end)
        folder = finetune(stage2_settings(tiny, tmp_path / "run", learning_rate=1e-2, projector_lr=1e-2))
        probes = load_file(folder / "probes.safetensors")
        row = {"input_ids": probes["0.input_ids"][None], "pixel_values": probes["0.pixel_values"]}
        loaded, _ = load_run(folder)
        with torch.no_grad():
            found, trained = loaded(**row).logits, kept[0].eval()(**row).logits
            base = loaded.disable_adapter
            with base():
                untrained = loaded(**row).logits
        assert torch.equal(found, trained)
        assert (found - untrained).abs().max() > 0.1

    def test_without_4bit(self, tiny: Tiny, tmp_path: Path) -> None:
        folder = finetune(stage2_settings(tiny, tmp_path / "run", load_in_4bit=False, max_steps=2))
        model, _ = load_run(folder)
        assert not quantized(model)
        assert read_record(folder).load_in_4bit is False
        assert "nf4" not in (folder / "ledger.txt").read_text(encoding="utf-8")

    @pytest.mark.parametrize("align", [False, True], ids=["as it is", "aligned before"])
    def test_a_llava_that_exists_is_tuned(self, tiny: Tiny, hf_layout: Path, tmp_path: Path, align: bool) -> None:
        chosen = settings(
            tiny, tmp_path / "run", language_model=None, vision_tower=None, model_name_or_path=hf_layout, max_steps=2,
            pretrain_file=write_records(tmp_path / "captions.json", [
                {"image": "0.png", "question": "<image>", "answer": "red"},
                {"image": "1.png", "question": "<image>", "answer": "green"},
            ]) if align else None,
            image_folder=tiny.rows.parent,
        )  # fmt: skip
        folder = finetune(chosen)
        model, _ = load_run(folder)
        names = {name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in quantized(model)}
        assert names == every_linear_of_the_language_model()
        assert read_record(folder).model == str(hf_layout)
        original = make_tiny_model(make_tiny_processor()).model.multi_modal_projector.state_dict()
        start = load_file(folder / "stage1" / "projector.safetensors") if align else original
        assert align == (not same(dict(original), start))

    def test_stage_1_of_a_llava_that_exists(self, tiny: Tiny, hf_layout: Path, tmp_path: Path) -> None:
        given = {"language_model": None, "vision_tower": None, "model_name_or_path": hf_layout}
        folder = pretrain(stage1_settings(tiny, tmp_path / "run", max_steps=2, **given))
        assert (folder / "projector.safetensors").is_file()


class TestSettingsThatContradict:
    def refused(self, run: Any, chosen: Settings) -> str:
        with pytest.raises(InputError) as caught:
            run(chosen)
        return refusal(caught.value)

    def test_no_data(self, tiny: Tiny, tmp_path: Path) -> None:
        message = self.refused(finetune, stage2_settings(tiny, tmp_path / "run", train_file=None))
        assert "train_file is missing" in message

    def test_evaluation_without_rows_is_left_out(self, tiny: Tiny, tmp_path: Path) -> None:
        folder = finetune(stage2_settings(tiny, tmp_path / "run", eval_file=None, max_steps=1, save_strategy="no"))
        assert not [m for m in lines(folder) if "eval_loss" in m]


def test_the_table_says_how_far_each_share_can_be_believed() -> None:
    names = ("frequent_answer", "blind", "untrained", "stage1", "stage2")
    found = {**dict.fromkeys((*names, "unseen_pairs"), 0.5), "by_type": {"colour": 0.9}, "n": 1000}
    counts = {**dict.fromkeys(names, 1000), "unseen_pairs": 100, "by_type": {"colour": 100}}
    text = scores.format_table({**found, "counts": counts})
    by_label = {" ".join(line.split()[:-4]): line.split()[-4:-1] for line in text.splitlines()[1:] if "#" in line}
    assert by_label["after stage 2"] == ["50.0%", "46.9-53.1", "1,000"]
    assert by_label["unseen pairs"] == ["50.0%", "40.4-59.6", "100"]
    assert by_label["colour"] == ["90.0%", "82.6-94.5", "100"]


def test_spaced() -> None:
    assert spaced(range(10), 3) == [0, 4, 8]
    assert spaced(range(3), 10) == [0, 1, 2]
    assert spaced(range(3), 0) == []
