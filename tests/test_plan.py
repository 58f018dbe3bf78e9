"""`qllava plan` over tiny folders and real names of open_clip: what it prints, its JSON, its errors. No weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlavaConfig

from qllava import cli
from qllava.models.lora import Lora
from qllava.training import memory
from tests.tiny_runs import Tiny

L336 = "open_clip:ViT-L-14-336-quickgelu/openai"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that holds a LLaMA's config.json and nothing else."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=1000
    )
    config.save_pretrained(folder)
    return str(folder)


def planned(capsys: pytest.CaptureFixture[str], *line: str, status: int = 0) -> dict[str, Any]:
    assert cli.main(["plan", *line, "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_llava_folder(hf_layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((hf_layout / "config.json").read_bytes())
    found = planned(capsys, "--model", str(tmp_path), "--lora-r", "4", "--tokens-per-pack", "300")
    assert {"peak_bytes", "phases", "parts", "fits", "suggestion"} <= found.keys()
    phases = found["phases"]
    assert list(phases) == ["before", "step", "evaluation", "chat"] and found["peak_bytes"] == max(phases.values())
    assert phases["evaluation"] == 0 < phases["before"]  # eval_strategy is no
    assert list(found["parts"]) == list(memory.PARTS) and sum(found["parts"].values()) == phases["step"]
    assert found["fits"] is None and found["suggestion"] == "A GPU with 4 GB is enough."
    setup = memory.Setup(LlavaConfig.from_pretrained(tmp_path), Lora(4, 4), tokens_per_pack=300)
    assert phases["step"] == memory.estimate(setup).peak_bytes
    alone = planned(capsys, "--model", str(tmp_path), "--lora-r", "0")
    assert alone["parts"]["LoRA"] == alone["phases"]["chat"] == 0  # a projector cannot be asked


def test_a_run_folder_is_planned_as_its_base(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["--language-model", str(tiny.language_model), "--vision-tower", str(tiny.tower)]
    flags = ["--lora-r", "4", "--tokens-per-pack", "64"]
    assert planned(capsys, "--model", str(tiny.stage2), *flags) == planned(capsys, *parts, *flags)


def test_parts_and_a_limit(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--language-model", llama, "--vision-tower", L336, "--lora-r", "4"]
    found = planned(capsys, *line, "--fit", "4GB")
    assert found["fits"] is True and found["peak_bytes"] <= 4 << 30
    assert found["tokens_per_pack"] >= 2048 and "fit_memory" in found["suggestion"]
    assert found["parts"]["weights"] > 2 * 300e6  # the tower, in 16 bit
    refused = planned(capsys, *line, "--fit", "1GB", "--tokens-per-pack", "2048", status=1)
    assert refused["fits"] is False and refused["peak_bytes"] > 1 << 30
    assert "more than the 1.0 GB" in refused["suggestion"]


def test_a_recipe_and_a_flag_above_it(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"language_model: {llama}\nvision_tower: {L336}\nlora_r: 8\nrecompute_layers: 1\nmax_length: 700\n"
        "fit_memory: 2GB\n"
    )
    found = planned(capsys, "--config", str(recipe))
    assert found["fits"] is True and found["recompute_layers"] == 1
    more = planned(capsys, "--config", str(recipe), "--lora-r", "16", "--tokens-per-pack", "700")
    fewer = planned(capsys, "--config", str(recipe), "--tokens-per-pack", "700")
    assert more["parts"]["LoRA"] == 2 * fewer["parts"]["LoRA"] > 0


@pytest.mark.parametrize("line", ["bf16: true", "fp16: true"])
def test_a_recipe_for_a_card_is_planned_for_a_card(
    line: str, llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a laptop: its CPU's figures (fp32, no context of CUDA) would be about another run."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"language_model: {llama}\nvision_tower: {L336}\nlora_r: 8\nmax_length: 700\n")
    plain = planned(capsys, "--config", str(recipe))
    recipe.write_text(recipe.read_text() + line + "\n")
    assert planned(capsys, "--config", str(recipe)) == plain
    recipe.write_text(recipe.read_text() + "use_cpu: true\n")
    if line == "bf16: true":
        on_cpu = planned(capsys, "--config", str(recipe))
        assert on_cpu["parts"]["weights"] > 1.5 * plain["parts"]["weights"]
        assert on_cpu["parts"]["workspace"] < memory.CONTEXT < plain["parts"]["workspace"]


def test_nano_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--tokens-per-pack", "200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in (*memory.PARTS, "before", "step", "evaluation", "chat", "peak"):
        (line,) = [line for line in lines if line.split()[0] == name]
        assert " MB" in line or " GB" in line
    assert any("###" in line for line in lines)
    assert lines[-2].startswith("with packs of 200 tokens, 0 layers recomputed")  # nano's own settings
    assert lines[-1] == "A GPU with 4 GB is enough."


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--model", "{empty}"], "is empty. Give the folder"),
        (["--model", "{llama}"], "of type 'llama'; expected a LLaVA"),
        (["--language-model", "{llama}"], "needs both"),
        (["--model", "x", "--language-model", "{llama}"], "not both"),
        (["--language-model", "{empty}", "--vision-tower", L336], "is empty. Give the folder"),
        (["--language-model", "{llama}", "--vision-tower", "open_clip:ViT-Z/x"], "no architecture 'ViT-Z'"),
        (["--language-model", "{llama}", "--vision-tower", "open_clip:RN50/openai"], "cannot be used"),
        (["--language-model", "{llama}", "--vision-tower", "somewhere"], "neither a folder nor"),
        (["--language-model", "{llama}", "--vision-tower", "{llama}"], "of type 'llama'"),
        (["--fit", "much"], "Write it like 12GB"),
        (["--config", "nowhere.yaml"], "does not exist"),
    ],
)
def test_errors(line: list[str], said: str, llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *[word.format(empty=tmp_path, llama=llama) for word in line], "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err
    assert captured.err.startswith("qllava: ") and captured.err.count("\n") == 1 and captured.err.endswith(".\n")


@pytest.mark.parametrize("line", ["--lora-r -1", "--lora-r many", "--tokens-per-pack 0"])
def test_a_wrong_command_line(line: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *line.split()])
    assert end.value.code == 2
