"""What cannot be exported as GGUF is refused in one sentence and leaves nothing; the command `qllava export`."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file

from qllava import cli
from qllava.config import InputError
from qllava.export.gguf import export
from tests.export.gguf_files import (
    HEAD,
    altered,
)
from tests.tiny_runs import Tiny, refusal


class TestRefusals:
    """Nothing is written, and what was there stays."""

    def refused(self, model: Path | str, out: Path, **how: Any) -> str:
        before = sorted(out.parent.iterdir())
        with pytest.raises(InputError) as caught:
            export(str(model), out, **how)
        assert sorted(out.parent.iterdir()) == before
        return refusal(caught.value)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"vision_config": {"model_type": "siglip_vision_model"}}, "only CLIP towers"),
            ({"text_config.model_type": "qwen2"}, "LLaMA and Mistral"),
            ({"text_config.hidden_act": "gelu"}, "silu"),
            ({"vision_config.hidden_act": "relu"}, "quick_gelu and gelu"),
            ({"vision_config.intermediate_size": 32}, "as wide as the tower"),
            ({"projector_hidden_act": "relu"}, "gelu and linear"),
            ({"vision_feature_layer": [-2, -1]}, "one layer is supported"),
            ({"vision_feature_layer": 0}, "one layer is supported"),
            ({"vision_feature_select_strategy": "full"}, "class token"),
            ({"text_config.rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
            ({"text_config.num_hidden_layers": 3}, "lack language_model.model.layers.2"),
            ({"text_config.num_hidden_layers": 1}, "layers.1.input_layernorm.weight has no place"),
            ({"model_type": "llava_next"}, "'llava_next'"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_llama_cpp_would_not_compute(
        self, hf_layout: Path, tmp_path: Path, changes: dict[str, Any], said: str
    ) -> None:
        assert said in self.refused(altered(hf_layout, tmp_path / "model", changes), tmp_path / "out")

    def test_no_chat_template(self, hf_layout: Path, tmp_path: Path) -> None:
        shutil.copytree(hf_layout, tmp_path / "model", ignore=shutil.ignore_patterns("chat_template.jinja"))
        assert "no chat template" in self.refused(tmp_path / "model", tmp_path / "out")

    @pytest.mark.parametrize("part", ["", "checkpoint-2"])
    def test_a_run(self, tiny: Tiny, tmp_path: Path, part: str) -> None:
        assert "merge it first: qllava merge" in self.refused(tiny.stage2 / part, tmp_path / "out")

    def test_a_stage_1(self, tiny: Tiny, tmp_path: Path) -> None:
        assert "is a run" in self.refused(tiny.stage1, tmp_path / "out")

    def test_nano_names_a_run(self, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qllava.runs.newest_nano_run", lambda: tiny.stage2)
        assert f"qllava merge {tiny.stage2} OUT" in self.refused("nano", tmp_path / "out")

    def test_no_such_folder(self, tmp_path: Path) -> None:
        assert str(tmp_path / "none") in self.refused(tmp_path / "none", tmp_path / "out")

    def test_a_folder_with_something_in_it(self, hf_layout: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()
        assert "is not empty" in self.refused(hf_layout, tmp_path / "out")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]

    @pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (1e6, "--quantize bf16")])
    def test_values_that_cannot_be_kept(self, hf_layout: Path, tmp_path: Path, value: float, said: str) -> None:
        name = "language_model.model.layers.1.mlp.up_proj.weight"
        weight = load_file(hf_layout / "model.safetensors")[name]
        weight[3, 3] = value
        source = altered(hf_layout, tmp_path / "model", {}, **{name: weight})
        message = self.refused(source, tmp_path / "out")
        assert said in message and name in message
        if value == 1e6:
            export(str(source), tmp_path / "bf16", quantize="bf16")

    def test_a_tensor_without_a_place(self, hf_layout: Path, tmp_path: Path) -> None:
        more = {"language_model.model.layers.0.self_attn.q_norm.weight": torch.ones(HEAD)}
        message = self.refused(altered(hf_layout, tmp_path / "model", {}, **more), tmp_path / "out")
        assert "q_norm" in message and "has no place" in message

    def test_a_shape_that_is_not_the_configs(self, hf_layout: Path, tmp_path: Path) -> None:
        for changes in ({"text_config.num_key_value_heads": 1}, {"vision_config.image_size": 64}):
            source = altered(hf_layout, tmp_path / str(len(str(changes))), changes)
            assert "should be" in self.refused(source, tmp_path / "out")

    def test_a_shard_that_is_cut_off(self, hf_layout: Path, tmp_path: Path) -> None:
        shutil.copytree(hf_layout, tmp_path / "model")
        path = tmp_path / "model" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        assert "truncated or corrupt" in self.refused(tmp_path / "model", tmp_path / "out")

    def test_a_shard_that_is_missing(self, hf_layout: Path, tmp_path: Path) -> None:
        shutil.copytree(hf_layout, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
        assert "has no weights" in self.refused(tmp_path / "model", tmp_path / "out")

    def test_more_tokens_than_rows(self, hf_layout: Path, tmp_path: Path) -> None:
        original = load_file(hf_layout / "model.safetensors")
        fewer = {
            name: original[name][:100].clone()
            for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
        }
        source = altered(hf_layout, tmp_path / "model", {"text_config.vocab_size": 100}, **fewer)
        assert "only 100 rows" in self.refused(source, tmp_path / "out")

    def test_a_full_disk(self, hf_layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(GGUFWriter, "write_tensor_data", full)
        message = self.refused(hf_layout, tmp_path / "out")
        assert "No space left on device" in message and "incomplete files were removed" in message


class TestCommand:
    def test_says_what_it_wrote(self, hf_layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["export", str(hf_layout), str(tmp_path / "out"), "--format", "gguf"]) == 0
        said = capsys.readouterr().out
        for name in ("tiny-f16.gguf", "mmproj-tiny-f16.gguf", "Modelfile"):
            assert (tmp_path / "out" / name).is_file() and name in said

    def test_a_refusal_is_one_line_and_status_1(
        self, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["export", str(tiny.stage2), str(tmp_path / "out"), "--format", "gguf"]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and "merge it first" in captured.err

    @pytest.mark.parametrize("line", ["export m out", "export m out --format onnx", "export m out --quantize q4_0"])
    def test_a_wrong_command_line_ends_with_2(self, line: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as end:
            cli.main(line.split())
        assert end.value.code == 2
        assert "usage:" in capsys.readouterr().err
