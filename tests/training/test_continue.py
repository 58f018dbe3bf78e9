"""What was trained can be the start of the next finetune: a merged model, or an adapter that is trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qllava.config import InputError
from qllava.merge import merge
from qllava.models.adapter import load_run, read_record
from qllava.training.run import finetune
from qllava.training.settings import Settings
from tests.tiny_runs import Tiny, refusal, settings

FREE: dict[str, Any] = {"language_model": None, "vision_tower": None, "template": None, "lora_dropout": 0}


def from_run(tiny: Tiny, folder: Path, **fields: Any) -> Settings:
    """Settings that say where to start, and nothing of the adapter."""
    rest = {"lora_r": None, "lora_alpha": None}
    return settings(tiny, folder, **{**FREE, **rest, "model_name_or_path": tiny.stage2, **fields})


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_an_adapter_is_trained_on(tiny: Tiny, tmp_path: Path) -> None:
    still = finetune(from_run(tiny, tmp_path / "still", learning_rate=1e-30, projector_lr=1e-30))
    further = finetune(from_run(tiny, tmp_path / "further", learning_rate=1e-2, projector_lr=1e-2))
    before = adapter(tiny.stage2)
    assert adapter(still).keys() == adapter(further).keys() == before.keys()
    for name, tensor in adapter(still).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-9)
    assert all((tensor - before[name]).abs().max() > 1e-4 for name, tensor in adapter(further).items())
    assert read_record(further) == read_record(tiny.stage2)
    assert merge(
        further, tmp_path / "out", base="nf4", dtype="float32", max_shard_size="5GB", verify=True
    ).verified  # fmt: skip


def test_a_checkpoint_is_trained_on(tiny: Tiny, tmp_path: Path) -> None:
    first = tiny.stage2 / "checkpoint-2"
    found = finetune(
        from_run(tiny, tmp_path / "run", model_name_or_path=first, learning_rate=1e-30, projector_lr=1e-30)
    )
    for name, tensor in adapter(found).items():
        torch.testing.assert_close(tensor, adapter(first)[name], rtol=0, atol=1e-9)


def test_a_merged_model_is_tuned(tiny: Tiny, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge(tiny.stage2, merged, base="nf4", dtype="float32", max_shard_size="5GB", verify=True)
    run = finetune(settings(tiny, tmp_path / "run", **{**FREE, "model_name_or_path": merged, "load_in_4bit": False}))
    assert read_record(run).model == str(merged)
    assert read_record(run).template == read_record(tiny.stage2).template
    model, _ = load_run(run)
    base = load_file(merged / "model.safetensors")
    weight = model.get_base_model().model.language_model.layers[0].mlp.up_proj.base_layer.weight
    assert torch.equal(weight, base["language_model.model.layers.0.mlp.up_proj.weight"])


class TestRefusals:
    def refused(self, chosen: Settings) -> str:
        with pytest.raises(InputError) as caught:
            finetune(chosen)
        return refusal(caught.value)

    def test_a_second_adapter_on_top(self, tiny: Tiny, tmp_path: Path) -> None:
        message = self.refused(from_run(tiny, tmp_path / "run", lora_r=8))
        assert "has lora_r 4" in message and "merge the run" in message

    @pytest.mark.parametrize(("name", "value"), [("template", "vicuna_v1"), ("load_in_4bit", False)])
    def test_another_base(self, tiny: Tiny, tmp_path: Path, name: str, value: Any) -> None:
        assert f"was trained with {name}" in self.refused(from_run(tiny, tmp_path / "run", **{name: value}))

    def test_a_start_that_would_be_overwritten(self, tiny: Tiny, tmp_path: Path) -> None:
        run = Path(shutil.copytree(tiny.stage2, tmp_path / "run"))
        (run / "results.json").unlink()
        before = sorted(run.rglob("*"))
        for start in (run, run / "checkpoint-2"):
            chosen = from_run(tiny, run, model_name_or_path=start, overwrite_output_dir="true")
            assert "is inside output_dir" in self.refused(chosen)
        assert sorted(run.rglob("*")) == before

    def test_an_adapter_with_other_layers(self, tiny: Tiny, tmp_path: Path) -> None:
        run = Path(shutil.copytree(tiny.stage2, tmp_path / "run"))
        state = {name: tensor for name, tensor in adapter(run).items() if "layers.1.mlp.up_proj" not in name}
        save_file(state, run / "adapter_model.safetensors", metadata={"format": "pt"})
        assert "layers.1.mlp.up_proj" in self.refused(from_run(tiny, tmp_path / "next", model_name_or_path=run))

    def test_a_stage_1_is_no_model(self, tiny: Tiny, tmp_path: Path) -> None:
        message = self.refused(from_run(tiny, tmp_path / "run", model_name_or_path=tiny.stage1))
        assert str(tiny.stage1) in message


def test_data_is_known_by_its_bytes(tiny: Tiny, tmp_path: Path) -> None:
    run = finetune(from_run(tiny, tmp_path / "run"))
    said = json.loads((run / "data.json").read_text(encoding="utf-8"))
    assert [file["file"] for file in said] == [tiny.rows.name] and len(said[0]["sha256"]) == 64
    card = (run / "README.md").read_text(encoding="utf-8")
    for told in (said[0]["sha256"], read_record(run).fingerprint, "- lora_r: 4", "library_name: peft", "licences"):
        assert told in card
    assert "Information Needed" not in card and not list(run.glob("checkpoint-*/README.md"))
