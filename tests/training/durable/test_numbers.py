"""NaN planted in an image, an adapter, a weight and a gradient; losses that jump."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from qllava.config import InputError
from qllava.data.images import open_image
from qllava.runs import MANIFEST_FILE, SPIKES_FILE, Run
from qllava.training.durable.checkpoints import seal
from qllava.training.durable.numbers import Alone, Guard, NotFinite, Spikes, shown
from qllava.training.main import main
from qllava.training.report import write_report
from qllava.training.run import finetune, pretrain
from qllava.training.trainer import LlavaTrainer
from tests.tiny_runs import Tiny, bits, changed, make_trainer, refusal, stage1_settings, stage2_settings

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


class _Poisoned:
    """A collator that plants NaN in the images of one sample."""

    def __init__(self, collator: Any, image: str) -> None:
        self.collator, self.image = collator, image

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        plain = type(self.collator)._pixels
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(self.collator), "_pixels", lambda own, rows: self._planted(plain(own, rows)))
            return self.collator(samples)  # type: ignore[no-any-return]

    def _planted(self, pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {path: value * (float("nan") if path == self.image else 1) for path, value in pixels.items()}


def third_step(trainer: LlavaTrainer) -> list[dict[str, Any]]:
    """The samples of the third batch in the order in which the loop takes them."""
    return list(list(trainer.get_train_dataloader())[2]["kept"].samples)


def stopped(trainer: LlavaTrainer, folder: Path) -> str:
    """Train until it stops at step 3: nothing of it is in the weights or on the disk. Returns what it said."""
    learned = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            learned[state.global_step] = bits(kwargs["model"])

    trainer.add_callback(Keep())
    with pytest.raises(NotFinite) as caught:
        trainer.train()
    message = refusal(caught.value)
    assert "at step 3" in message and "no weight was changed" in message
    assert sorted(learned) == [1, 2]
    assert not changed(learned[2], trainer.model)
    assert [p.name for p in Run(folder).checkpoints()] == ["checkpoint-1", "checkpoint-2"]
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    saved = load_file(folder / "checkpoint-2" / "projector.safetensors")
    own = {name: tensor for name, tensor in learned[2].items() if "original_module" not in name}
    for name, tensor in saved.items():
        (weight,) = (t for own_name, t in own.items() if own_name.endswith(name) and "multi_modal" in own_name)
        assert torch.equal(weight, tensor)
    return message


class TestAImage:
    @pytest.mark.parametrize("lora", [True, False], ids=["stage 2", "stage 1"])
    def test_is_named_and_no_other(self, tiny: Tiny, tmp_path: Path, lora: bool) -> None:
        trainer = make_trainer(tiny, tmp_path, lora=lora, **SAVING)
        guilty, innocent = third_step(trainer)
        (image,) = guilty["image_files"]
        trainer.data_collator = _Poisoned(trainer.data_collator, image)  # type: ignore[assignment]
        message = stopped(trainer, tmp_path)
        assert message.startswith(
            f"The loss is nan at step 3, because of the sample {guilty['id']} (image {image}, whose pixel values "
            "are not finite);"
        )
        assert innocent["id"] not in message

    def test_no_file_can_hold_one(self, tmp_path: Path) -> None:
        """A TIFF of floats can, and is refused; what is read has 8 bits a channel."""
        Image.fromarray(np.full((4, 4), np.nan, np.float32), "F").save(tmp_path / "nan.tiff")
        with Image.open(tmp_path / "nan.tiff") as raw:
            assert np.isnan(np.asarray(raw)).all()
        with pytest.raises(InputError, match="infinite or NaN"):
            open_image(tmp_path / "nan.tiff")
        Image.fromarray(np.full((4, 4), 0.5, np.float32), "F").save(tmp_path / "half.tiff")
        assert np.asarray(open_image(tmp_path / "half.tiff")).dtype == np.uint8


class TestAGradient:
    @pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "not clipped"])
    def test_of_one_sample(self, tiny: Tiny, tmp_path: Path, max_grad_norm: float) -> None:
        trainer = make_trainer(tiny, tmp_path, max_grad_norm=max_grad_norm, **SAVING)
        innocent, guilty = third_step(trainer)
        weight = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
        shown_now: list[str] = []
        collator = trainer.data_collator
        plain = trainer.pack_step.compute

        def rows(model: Any, batch: dict[str, Any], number: Any) -> Any:
            shown_now[:] = batch["ids"]
            return plain(model, batch, number)

        trainer.pack_step.compute = rows  # type: ignore[method-assign]
        weight.register_hook(lambda g: g * float("inf") if guilty["id"] in shown_now else g)
        message = stopped(trainer, tmp_path)
        assert collator is trainer.data_collator
        assert message.startswith(f"A gradient is not finite at step 3, because of the sample {guilty['id']} (image ")
        assert innocent["id"] not in message

    def test_of_no_sample_alone(self, tiny: Tiny, tmp_path: Path) -> None:
        trainer = make_trainer(tiny, tmp_path, **SAVING)
        ids = [sample["id"] for sample in third_step(trainer)]
        weight = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
        # Once: looked at again, every sample is in order.
        times = [float("nan")]
        weight.register_hook(lambda g: g * times.pop() if trainer.state.global_step == 2 and times else g)
        message = stopped(trainer, tmp_path)
        assert f"with the samples {', '.join(ids)}, none of which causes it alone" in message

    def test_names_those_of_the_whole_step(self, tiny: Tiny, tmp_path: Path) -> None:
        trainer = make_trainer(tiny, tmp_path, gradient_accumulation_steps=4, max_steps=1)
        weight = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
        weight.register_hook(lambda g: g * float("nan"))
        with pytest.raises(NotFinite) as caught:
            trainer.train()
        assert all(f"the sample row-{index} " in str(caught.value) for index in range(8))

    @pytest.mark.parametrize(("scale", "stops"), [(65536.0, False), (0.5, True)])
    def test_of_half_precision_stops_when_scaling_does_not_help(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float, stops: bool
    ) -> None:
        class Scaler:
            def get_scale(self) -> float:
                return scale

            def scale(self, loss: Any) -> Any:
                return loss

            def step(self, optimizer: Any, closure: Any) -> None:
                """None: a gradient is infinite."""

            def update(self) -> None:
                """None here."""

        trainer = make_trainer(tiny, tmp_path, max_steps=1)
        monkeypatch.setattr(trainer.accelerator, "scaler", Scaler())
        weight = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
        weight.register_hook(lambda g: g * float("inf"))
        if stops:
            with pytest.raises(NotFinite, match="A gradient is not finite at step 1"):
                trainer.train()
        else:  # the scaler would skip the step
            trainer.train()


class TestAWeight:
    def plant(self, trainer: LlavaTrainer) -> str:
        name, weight = next((n, p) for n, p in trainer.model.named_parameters() if "lora_B" in n)
        with torch.no_grad():
            weight[0, 0] = float("nan")
        return name

    def test_is_named_before_the_samples(self, tiny: Tiny, tmp_path: Path) -> None:
        trainer = make_trainer(tiny, tmp_path)
        name = self.plant(trainer)
        with pytest.raises(NotFinite) as caught:
            trainer.train()
        assert f"at step 1, because the weight {name} is not finite" in refusal(caught.value)
        assert "row-" not in str(caught.value)

    def test_is_not_saved(self, tiny: Tiny, tmp_path: Path) -> None:
        """It became so in the optimizer: the good checkpoint stays, though only one is kept."""
        trainer = make_trainer(tiny, tmp_path, save_total_limit=1, **SAVING)

        class Plant(TrainerCallback):
            def on_step_end(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 2:
                    self.plant(trainer)

        trainer.add_callback(Plant())
        with pytest.raises(NotFinite) as caught:
            trainer.train()
        assert "is not finite after step 2, which is therefore not saved" in refusal(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]

    def test_is_no_result(self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The last step's may be seen only when the result is written."""

        def broken(self: Any, *_: Any, **__: Any) -> None:
            with torch.no_grad():
                next(p for p in self.model.parameters() if p.requires_grad).fill_(float("inf"))

        monkeypatch.setattr(LlavaTrainer, "train", broken)
        folder = tmp_path / "run"
        with pytest.raises(NotFinite):
            pretrain(stage1_settings(tiny, folder))
        assert not (folder / "results.json").exists() and not (folder / "projector.safetensors").exists()


def spoil(path: Path) -> str:
    """Plant NaN in the first tensor of a file."""
    state = load_file(path)
    name = next(iter(state))
    state[name].view(-1)[0] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    return name


class TestAnAdapter:
    def test_that_is_trained_on(self, tiny: Tiny, tmp_path: Path) -> None:
        given = tmp_path / "given"
        shutil.copytree(tiny.stage2, given)
        name = spoil(given / "adapter_model.safetensors")
        changes = {"language_model": None, "vision_tower": None, "projector": None, "template": None}
        chosen = stage2_settings(tiny, tmp_path / "run", model_name_or_path=given, **changes)
        with pytest.raises(InputError) as caught:
            finetune(chosen)
        said = refusal(caught.value)
        assert f"adapter_model.safetensors cannot be used: {name} contains NaN or infinity" in said

    def test_projector_of_a_stage_1(self, tiny: Tiny, tmp_path: Path) -> None:
        given = tmp_path / "given"
        shutil.copytree(tiny.stage1, given)
        name = spoil(given / "projector.safetensors")
        with pytest.raises(InputError) as caught:
            finetune(stage2_settings(tiny, tmp_path / "run", projector=given))
        assert f"{given / 'projector.safetensors'} cannot be used: {name} contains" in refusal(caught.value)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_of_a_checkpoint(self, tiny: Tiny, tmp_path: Path, stage: int) -> None:
        """Sealed with the NaN in it, so that the hashes agree; no run of ours writes that."""
        folder = tmp_path / "run"
        shutil.copytree(tiny.stage1 if stage == 1 else tiny.stage2, folder)
        (folder / "results.json").unlink()
        place = folder / "checkpoint-2"
        shutil.rmtree(folder / "checkpoint-4")
        begun = json.loads((place / MANIFEST_FILE).read_text())["begun_with"]
        (place / MANIFEST_FILE).unlink()
        name = spoil(place / ("projector.safetensors" if stage == 1 else "adapter_model.safetensors"))
        seal(place, begun)
        with pytest.raises(InputError) as caught:
            if stage == 1:
                pretrain(stage1_settings(tiny, folder))
            else:
                finetune(stage2_settings(tiny, folder))
        assert f"{name} contains NaN or infinity; remove {place}, and the same command" in refusal(caught.value)


def test_the_status_is_1(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(settings: Any) -> Path:
        raise NotFinite("The loss is nan.")

    assert main(run, lambda: stage1_settings(tiny, tmp_path)) == 1
    assert capsys.readouterr().err == "qllava: The loss is nan.\n"


class TestGuard:
    """The guard alone, with a model of one weight."""

    SAMPLES = ({"id": "a", "image_files": ["1.png"]}, {"id": "b", "image_files": []})

    def check(self, folder: Path, losses: list[float], norm: float, **named: Any) -> list[tuple[str, bool]]:
        """Check a step in which b is to blame; returns which samples were computed alone, and for which figure."""
        looked: list[tuple[str, bool]] = []

        def look(sample: Any, gradient: bool) -> Alone:
            looked.append((sample["id"], gradient))
            return Alone(pixels=True, result=sample["id"] != "b")

        guard = Guard(Spikes(folder / SPIKES_FILE, "finetune"), look)
        try:
            guard.check(7, torch.nn.Linear(1, 1), [torch.tensor(x) for x in losses], norm, self.SAMPLES, **named)
        except NotFinite as error:
            assert "at step 7, because of the sample b; no weight was changed" in refusal(error)
        else:
            assert not looked
        return looked

    def test_finite_numbers_pass(self, tmp_path: Path) -> None:
        assert self.check(tmp_path, [1.0, 2.0], 3.0) == []

    def test_the_loss_and_the_gradient_are_searched_for(self, tmp_path: Path) -> None:
        assert self.check(tmp_path, [1.0, float("nan")], 3.0) == [("a", False), ("b", False)]
        assert self.check(tmp_path, [1.0, 2.0], float("inf")) == [("a", True), ("b", True)]

    def test_a_scale_that_is_being_searched_for_is_no_fault(self, tmp_path: Path) -> None:
        assert self.check(tmp_path, [1.0], float("inf"), searching=lambda: True) == []
        assert self.check(tmp_path, [float("inf")], 1.0, searching=lambda: True) != []

    def test_a_spike_is_written_with_the_samples(self, tmp_path: Path) -> None:
        guard = Guard(Spikes(tmp_path / SPIKES_FILE, "finetune"), lambda *_: pytest.fail("nothing is searched"))
        for step in range(20):
            guard.check(step, torch.nn.Linear(1, 1), [torch.tensor(2.0 if step < 19 else 50.0)], 1.0, self.SAMPLES)
        (line,) = map(json.loads, (tmp_path / SPIKES_FILE).read_text().splitlines())
        assert (line["step"], line["loss"], line["usual"], line["ids"]) == (19, 50.0, 2.0, ["a", "b"])


class TestSpikes:
    def losses(self, count: int) -> list[float]:
        return [2.0 + 0.1 * (number % 3) for number in range(count)]

    def test_a_jump_is_told_of(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / SPIKES_FILE
        spikes = Spikes(path, "finetune")
        for step, loss in enumerate([*self.losses(20), 9.0, *self.losses(3), 9.5], start=1):
            if (usual := spikes.usual(loss)) is not None:
                spikes.tell(step, loss, usual, [f"row-{step}"])
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(line["step"], line["loss"], line["ids"]) for line in found] == [
            (21, 9.0, ["row-21"]),
            (25, 9.5, ["row-25"]),
        ]
        assert all(line["usual"] == pytest.approx(2.1) and line["stage"] == "finetune" for line in found)
        assert "The loss jumped to 9 at step 21 (usually 2.1), with row-21." in capsys.readouterr().out

    @pytest.mark.parametrize(
        "losses",
        [[2.0] * 15 + [90.0], [2.0 - 0.02 * n for n in range(80)], [2.0, 3.5] * 40, [0.01] * 20 + [0.015]],
        ids=["too early", "falling", "noisy", "not twice"],
    )
    def test_nothing_is_said_of(self, tmp_path: Path, losses: list[float]) -> None:
        spikes = Spikes(tmp_path / SPIKES_FILE, "finetune")
        assert [loss for loss in losses if spikes.usual(loss) is not None] == []

    def test_the_run_goes_on(self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = make_trainer(tiny, tmp_path, max_steps=20)
        plain = trainer.pack_step.compute

        def rows(model: Any, batch: dict[str, Any], number: Any) -> Any:
            return plain(model, batch, number) * (50 if trainer.state.global_step == 17 else 1)

        trainer.pack_step.compute = rows  # type: ignore[method-assign]
        trainer.train()
        assert trainer.state.global_step == 20
        (line,) = map(json.loads, (tmp_path / SPIKES_FILE).read_text().splitlines())
        assert line["step"] == 18 and len(line["ids"]) == 2 and line["stage"] == "finetune"

    def test_stand_in_the_report(self, tmp_path: Path) -> None:
        lines = [{"stage": "finetune", "step": n, "total_steps": 30, "loss": 2.0} for n in range(1, 31)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        spike = {"stage": "finetune", "step": 18, "loss": 77.0, "usual": 2.0, "ids": ["a<b", "c"]}
        (tmp_path / SPIKES_FILE).write_text(2 * (json.dumps(spike) + "\n"))  # told again after a kill
        html = write_report(tmp_path).read_text(encoding="utf-8")
        assert "Steps whose loss jumped: 1" in html and "a&lt;b, c" in html
        assert html.count("<title>jumps, 18: 77</title>") == 1

    def test_damaged_ones_do_not_cost_the_report(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"stage": "finetune", "step": 1, "loss": 2.0}\n')
        spike = {"stage": "finetune", "step": 1, "loss": 7.0, "usual": "?", "ids": None}
        (tmp_path / SPIKES_FILE).write_text(json.dumps(spike) + '\n{"stage": "finetune", "st')
        assert "Steps whose loss jumped: 1" in write_report(tmp_path).read_text(encoding="utf-8")

    def test_many_names_are_cut(self) -> None:
        assert shown([str(n) for n in range(10)], most=2) == "0, 1 and 8 more"
        assert shown(["a"]) == "a"
