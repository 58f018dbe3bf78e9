"""A merge that cannot be made or verified is refused in one sentence, and writes nothing."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qllava import merge as merging
from qllava.config import InputError
from qllava.models.delta import Delta
from tests import commands
from tests.tiny_models import make_tiny_parts
from tests.tiny_runs import Tiny, refusal, run_merge

KILLED = """
from pathlib import Path
from qllava.merge import merge
from tests.planted import killed, planted
with planted("{operation}", "{pattern}", killed):
    merge(Path("{run}"), Path("{out}"), base="nf4", dtype="float32", max_shard_size="5GB", verify=True)
"""


class TestRefusals:
    """Nothing is written, and what was there stays."""

    def refused(self, run: Path, out: Path, **changes: Any) -> str:
        before = sorted(p.name for p in out.parent.iterdir())
        with pytest.raises(InputError) as caught:
            run_merge(run, out, **changes)
        assert sorted(p.name for p in out.parent.iterdir()) == before
        return refusal(caught.value)

    def test_another_base_in_the_same_place(self, tiny: Tiny, tmp_path: Path) -> None:
        run, place = tmp_path / "run", tmp_path / "parts"
        place.mkdir()
        language_model, _ = make_tiny_parts(place, seed=9)
        shutil.copytree(tiny.stage2, run)
        record = json.loads((run / "qllava.json").read_text(encoding="utf-8"))
        record["language_model"] = str(language_model)
        (run / "qllava.json").write_text(json.dumps(record), encoding="utf-8")
        for base in ("nf4", "original"):
            message = self.refused(run, tmp_path / "out", base=base)
            assert "was trained on another base than" in message and str(language_model) in message

    def test_the_base_is_gone(self, tiny: Tiny, tmp_path: Path) -> None:
        run = tmp_path / "run"
        shutil.copytree(tiny.stage2, run)
        record = json.loads((run / "qllava.json").read_text(encoding="utf-8"))
        record["language_model"] = str(tmp_path / "gone")
        (run / "qllava.json").write_text(json.dumps(record), encoding="utf-8")
        assert str(tmp_path / "gone") in self.refused(run, tmp_path / "out")

    def test_a_folder_with_something_in_it(self, tiny: Tiny, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "mine.txt").write_text("mine", encoding="utf-8")
        assert "is not empty" in self.refused(tiny.stage2, out)
        assert [p.name for p in out.iterdir()] == ["mine.txt"]

    def test_that_is_said_before_anything_is_loaded(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()

        def load(*_: Any, **__: Any) -> Any:
            raise AssertionError("minutes of loading, for nothing")

        monkeypatch.setattr(merging, "outline", load)
        assert "is not empty" in self.refused(tiny.stage2, tmp_path / "out")

    def test_a_stage_1(self, tiny: Tiny, tmp_path: Path) -> None:
        assert "is a stage 1 run, which has only a projector" in self.refused(tiny.stage1, tmp_path / "out")

    def test_no_folder(self, tmp_path: Path) -> None:
        assert "nope does not exist" in self.refused(tmp_path / "nope", tmp_path / "out")

    def test_no_run(self, tmp_path: Path) -> None:
        assert "is not a run of qllava" in self.refused(tmp_path, tmp_path / "out")

    def test_a_run_that_never_finished(self, tiny: Tiny, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.mkdir()
        shutil.copytree(tiny.stage2 / "checkpoint-2", run / "checkpoint-2")
        message = self.refused(run, tmp_path / "out")
        assert "is not finished" in message and str(run / "checkpoint-2") in message

    def test_a_merged_folder(self, tiny: Tiny, tmp_path: Path) -> None:
        run_merge(tiny.stage2, tmp_path / "merged", verify=False)
        assert "is already a merged model" in self.refused(tmp_path / "merged", tmp_path / "out")

    def adapter(self, tiny: Tiny, tmp_path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
        """A copy of the run with other tensors in its adapter."""
        shutil.copytree(tiny.stage2, tmp_path / "run")
        path = tmp_path / "run" / "adapter_model.safetensors"
        save_file({n: change(n, t).contiguous() for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
        return tmp_path / "run"

    def test_an_adapter_of_another_rank(self, tiny: Tiny, tmp_path: Path) -> None:
        def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:2] if "lora_A" in name else tensor[:, :2] if "lora_B" in name else tensor

        message = self.refused(self.adapter(tiny, tmp_path, cut), tmp_path / "out")
        assert "does not match its" in message and "rank 2, and r is 4" in message

    def test_an_adapter_of_another_base(self, tiny: Tiny, tmp_path: Path) -> None:
        def widen(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor], dim=1) if "lora_A" in name else tensor

        assert "does not fit this base" in self.refused(self.adapter(tiny, tmp_path, widen), tmp_path / "out")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("layers.1.mlp.up_proj.lora_A", "has no lora_A or no lora_B"),
            ("linear_1.weight", "incomplete: the projector's"),
        ],
    )
    def test_an_adapter_that_is_not_whole(self, tiny: Tiny, tmp_path: Path, name: str, said: str) -> None:
        shutil.copytree(tiny.stage2, tmp_path / "run")
        path = tmp_path / "run" / "adapter_model.safetensors"
        save_file({n: t for n, t in load_file(path).items() if name not in n}, path, metadata={"format": "pt"})
        assert said in self.refused(tmp_path / "run", tmp_path / "out", verify=False)

    def test_a_projector_of_another_width(self, tiny: Tiny, tmp_path: Path) -> None:
        def widen(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor]) if "linear_1.bias" in name else tensor

        run = self.adapter(tiny, tmp_path, widen)
        assert "linear_1.bias is (64,)" in self.refused(run, tmp_path / "out", verify=False)

    @pytest.mark.parametrize("what", ["vocabulary", "chat template"])
    def test_settings_that_are_read_back_as_others(
        self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        load = merging.load_config

        def other(folder: str) -> Any:
            config, processor = load(folder)
            if what == "vocabulary":
                processor.tokenizer.add_tokens(["one more"])
            else:
                processor.chat_template = "{{ messages }}"
            return config, processor

        monkeypatch.setattr(merging, "load_config", other)
        assert f"The {what} of the merged model" in self.refused(tiny.stage2, tmp_path / "out")

    def test_an_adapter_with_nan(self, tiny: Tiny, tmp_path: Path) -> None:
        def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.fill_(float("nan")) if "layers.1.mlp.up_proj.lora_B" in name else tensor

        message = self.refused(self.adapter(tiny, tmp_path, spoil), tmp_path / "out")
        assert "contains NaN or infinity" in message and "layers.1.mlp.up_proj.lora_B" in message

    @pytest.mark.parametrize("how", ["missing", "cut off", "changed"])
    def test_a_base_that_is_not_whole(self, tiny: Tiny, tmp_path: Path, how: str) -> None:
        run, place = tmp_path / "run", tmp_path / "llama"
        shutil.copytree(tiny.language_model, place)
        shutil.copytree(tiny.stage2, run)
        record = json.loads((run / "qllava.json").read_text(encoding="utf-8"))
        (run / "qllava.json").write_text(json.dumps({**record, "language_model": str(place)}), encoding="utf-8")
        weights = place / "model.safetensors"
        if how == "missing":
            weights.unlink()
        elif how == "cut off":
            weights.write_bytes(weights.read_bytes()[:-100])
        else:
            state = load_file(weights)
            state["model.norm.weight"][0] += 1
            save_file(state, weights, metadata={"format": "pt"})
        said = {"missing": "has no weights", "cut off": "truncated or corrupt", "changed": "different weights"}[how]
        message = self.refused(run, tmp_path / "out")
        assert said in message and str(place) in message

    def test_no_room(self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
        assert "Free disk space" in self.refused(tiny.stage2, tmp_path / "out")

    @pytest.mark.parametrize(
        ("operation", "name"),
        [
            ("mkdir", ""),
            ("chmod", "/model.safetensors"),
            ("write", "/config.json"),
            ("write", "/preprocessor_config.json"),
            ("read", "/config.json"),
            ("write", "/README.md"),
        ],
        ids=["before all", "weights", "settings", "processor", "comparison", "card"],
    )
    def test_a_merge_that_is_killed(self, tiny: Tiny, tmp_path: Path, operation: str, name: str) -> None:
        """Wherever it ends, no folder of that name is left, and the next one is whole."""
        pattern = f"{tmp_path}/.*{name}"
        script = KILLED.format(operation=operation, pattern=pattern, run=tiny.stage2, out=tmp_path / "out")
        ended = commands.run("-c", script)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not (tmp_path / "out").exists()
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())
        assert run_merge(tiny.stage2, tmp_path / "out", verify=False)
        assert [path.name for path in tmp_path.iterdir()] == ["out"], "what was left is gone"

    def test_no_rows_to_verify_on(self, tiny: Tiny, tmp_path: Path) -> None:
        shutil.copytree(tiny.stage2, tmp_path / "run", ignore=shutil.ignore_patterns("probes*"))
        assert "--no-verify" in self.refused(tmp_path / "run", tmp_path / "out")

    def test_a_full_disk(self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("qllava.models.checkpoint.save_file", full)
        message = self.refused(tiny.stage2, tmp_path / "out")
        assert "No space left on device" in message and "out could not be written" in message

    def test_a_merge_that_went_wrong(self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A forgotten delta is found by asking, not by trusting."""
        monkeypatch.setattr(Delta, "of", lambda delta, layer: torch.zeros(()))
        shutil.copytree(tiny.stage2, tmp_path / "run")
        path = tmp_path / "run" / "adapter_model.safetensors"
        state = {name: t + 0.05 if "lora_B" in name else t for name, t in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})
        message = self.refused(tmp_path / "run", tmp_path / "out")
        assert "differs from the adapter model" in message
