"""A base that moved: found where `--base-model` says, checked by its fingerprint, and named where it is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qllava
from qllava import cli
from qllava.config import InputError
from qllava.inference import load
from qllava.merge import _record
from qllava.models.adapter import add_lora, load_run, save_record
from qllava.models.assemble import assemble
from qllava.models.bases import located
from qllava.models.lora import Lora
from qllava.models.outline import Recipe
from qllava.training.base import same_base
from qllava.training.plan import plan
from qllava.training.settings import parse
from tests.tiny_models import make_image, make_tiny_llava, make_tiny_parts
from tests.tiny_runs import refusal


@dataclass(frozen=True)
class Moved:
    """A run whose base was moved after it was trained."""

    run: Path
    parts: list[str]
    """Where the parts of its base are now."""
    gone: list[str]
    """Where they were."""
    answer: str
    """What it said before."""


def make_run(folder: Path, recipe: Recipe) -> Path:
    """The folder of a run, with an adapter that does something, as a training leaves it."""
    assembled = assemble(recipe)
    model = add_lora(assembled, Lora(4, 8))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    folder.mkdir()
    model.save_pretrained(folder)
    assembled.processor.save_pretrained(folder)
    save_record(assembled.recipe, folder)
    return folder


def moved(folder: Path, parts: list[Path], recipe: Recipe) -> Moved:
    run = make_run(folder / "run", recipe)
    answer = load(str(run)).answer(make_image("red"), "What?", max_new_tokens=8)
    now = [Path(shutil.move(part, folder / f"moved-{part.name}")) for part in parts]
    return Moved(run, [str(part) for part in now], [str(part) for part in parts], answer)


@pytest.fixture(params=["a LLaVA", "parts"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Moved:
    """A run over each kind of base."""
    rest: dict[str, Any] = {
        "projector_type": "mlp2x_gelu", "vision_feature_layer": -2, "image_aspect": "pad", "template": "chatml",
        "load_in_4bit": False,
    }  # fmt: skip
    if request.param == "a LLaVA":
        llava = make_tiny_llava(tmp_path / "llava")
        return moved(tmp_path, [llava], Recipe(str(llava), None, None, **rest))
    llm, tower = make_tiny_parts(tmp_path)
    return moved(tmp_path, [llm, tower], Recipe(None, str(llm), str(tower), **rest))


def finetuned(run: Path, parts: list[str]) -> Recipe:
    """What a training that starts from the run builds on."""
    line = ["--model_name_or_path", str(run), *(["--base_model", *parts] if parts else [])]
    settings = parse(line, output_dir="unused", nano={})
    return same_base(settings, run)


LOADERS: dict[str, Callable[[Path, list[str]], Any]] = {
    "chat, eval and demo": lambda run, parts: load(str(run), base_model=parts),
    "Python": lambda run, parts: qllava.load(str(run), base_model=parts),
    "adapter": load_run,
    "merge": _record,
    "finetune": finetuned,
    "plan": lambda run, parts: plan(model=str(run), base_model=parts),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_the_flag_is_named_where_the_base_is_missing(loader: str, base: Moved) -> None:
    with pytest.raises(InputError, match=r"has moved.*--base-model DIR") as error:
        LOADERS[loader](base.run, [])
    assert base.gone[0] in refusal(error.value)
    LOADERS[loader](base.run, base.parts)


def test_the_model_is_the_one_that_was_trained(base: Moved) -> None:
    chat = qllava.load(str(base.run), base_model=base.parts)
    assert chat.answer(make_image("red"), "What?", max_new_tokens=8) == base.answer
    if len(base.parts) == 1:
        chat = qllava.load(str(base.run), base_model=base.parts[0])
        assert chat.answer(make_image("red"), "What?", max_new_tokens=8) == base.answer


def test_another_base_is_refused(base: Moved) -> None:
    weights = Path(base.parts[0]) / "model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"was trained on another base than .*\(different weights\).*--base-model"):
        load(str(base.run), base_model=base.parts)


def test_every_command_has_the_flag(base: Moved, capsys: pytest.CaptureFixture[str]) -> None:
    run, none = str(base.run), str(base.run.parent / "nothing")
    (Path(none) / "of a model").mkdir(parents=True)
    lines = [
        ["chat", run, "--prompt", "What?", "--base-model", none],
        ["merge", run, f"{none}-merged", "--no-verify", "--base-model", none],
        ["plan", "--model", run, "--base-model", none],
    ]
    for line in lines:
        assert cli.main(line) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{none} is not a base model" in said, line


def test_what_is_no_part_of_the_base(base: Moved, tmp_path: Path) -> None:
    record = located(base.run, base.parts)
    other = make_tiny_parts(tmp_path / "o")[0] if record.model else make_tiny_llava(tmp_path / "o")
    with pytest.raises(InputError, match=r"was built from: .*\. Use --base-model DIR only for these parts") as error:
        located(base.run, [*base.parts, str(other)])
    refusal(error.value)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="of type 'bert', which is not part of a LLaVA"):
        located(base.run, str(tmp_path / "x"))


def test_where_there_is_no_run_the_flag_is_refused(base: Moved, tmp_path: Path) -> None:
    whole = str(make_tiny_llava(tmp_path / "whole"))
    with pytest.raises(InputError, match="is not a run with an adapter"):
        load(whole, base_model=base.parts)


def test_a_base_on_the_hub_that_cannot_be_had(base: Moved, monkeypatch: pytest.MonkeyPatch) -> None:
    record = replace(located(base.run, base.parts), model="some/llava", language_model=None, vision_tower=None)
    save_record(record, base.run)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"The base of .*some/llava is not .*in the hub's cache.*--base-model DIR"):
        load(str(base.run))
