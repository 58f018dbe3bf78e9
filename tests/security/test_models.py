"""Models from outside: none runs code here, neither what lies in its folder as code nor what hides in its weights."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qllava.config import InputError
from qllava.inference import load
from qllava.models.adapter import load_run
from qllava.models.assemble import load_language_model
from qllava.models.checkpoint import load_llava
from qllava.models.language import load_tokenizer
from qllava.models.reading import read_model
from qllava.models.vision import load_tower
from qllava.models.weights import open_weights
from qllava.training.plan import plan
from tests.tiny_runs import Tiny, refusal

OWN = """
import pathlib
pathlib.Path({ran!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, LlavaProcessor, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
class Processor(LlavaProcessor):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "own.Config",
    "AutoModelForCausalLM": "own.Model",
    "AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"],
    "AutoProcessor": "own.Processor",
    "AutoImageProcessor": "own.Processor",
}


class Yes(io.StringIO):
    """Somebody at the terminal who agrees to whatever is asked."""

    def readline(self, *_: Any) -> str:
        return "y\n"


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.ran,)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """What is there once code of a model has run."""
    return tmp_path / "ran"


def edit(path: Path, **values: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_code(folder: Path, out: Path, ran: Path) -> Path:
    """A copy of a model that brings code of its own, and says in every file that it is needed."""
    shutil.copytree(folder, out)
    (out / "own.py").write_text(OWN.format(ran=str(ran)))
    for path in out.glob("*config.json"):
        edit(path, auto_map=AUTO_MAP)
    edit(out / "config.json", model_type="own")
    if (out / "tokenizer_config.json").is_file():
        edit(out / "tokenizer_config.json", tokenizer_class="Tokenizer")
    if (out / "processor_config.json").is_file():
        edit(out / "processor_config.json", processor_class="Processor")
    return out


def test_the_bomb_goes_off(ran: Path) -> None:
    """The tests below can fail."""
    pickle.loads(pickle.dumps(Bomb(ran)))
    assert ran.exists()


@pytest.mark.parametrize("kind", ["language model", "tokenizer", "tower", "llava", "reading", "plan", "chat"])
def test_code_of_a_model_is_never_run(
    kind: str, tiny: Tiny, hf_layout: Path, tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where somebody says yes: transformers would ask, and run it."""
    source = {"language model": tiny.language_model, "tokenizer": tiny.language_model, "tower": tiny.tower}
    model = str(with_code(source.get(kind, hf_layout), tmp_path / "model", ran))
    monkeypatch.setattr(sys, "stdin", Yes())
    loaders: dict[str, Callable[[], Any]] = {
        "language model": lambda: load_language_model(model, torch.float32, "cpu", four_bit=False, tokens=8),
        "tokenizer": lambda: load_tokenizer(model),
        "tower": lambda: load_tower(model),
        "llava": lambda: load_llava(model, dtype=torch.float32),
        "reading": lambda: read_model(model),
        "plan": lambda: plan(
            config=None,
            model=model,
            language_model=None,
            vision_tower=None,
            lora_r=None,
            tokens_per_pack=None,
            limit=None,
        ),
        "chat": lambda: load(model),
    }
    with pytest.raises(InputError) as error:
        loaders[kind]()
    refusal(error.value)
    assert not ran.exists()
    if kind != "tower":  # which is refused by its type before anything is loaded
        assert "its own Python code, which qllava never runs" in str(error.value)


def only_pickled(folder: Path, out: Path, ran: Path, *, file: str, replaces: str) -> Path:
    """A copy of a model that has a pickle in the place of its weights."""
    shutil.copytree(folder, out)
    (out / replaces).unlink()
    torch.save({"weight": Bomb(ran)}, out / file)
    return out


@pytest.mark.parametrize("kind", ["language model", "tower", "llava"])
def test_pickled_weights_are_refused(kind: str, tiny: Tiny, hf_layout: Path, tmp_path: Path, ran: Path) -> None:
    source = {"language model": tiny.language_model, "tower": tiny.tower, "llava": hf_layout}[kind]
    folder = only_pickled(source, tmp_path / "m", ran, file="pytorch_model.bin", replaces="model.safetensors")
    with pytest.raises(InputError, match="safetensors"):
        if kind == "language model":
            load_language_model(str(folder), torch.float32, "cpu", four_bit=False, tokens=8)
        elif kind == "tower":
            load_tower(str(folder))
        else:
            load_llava(str(folder), dtype=torch.float32)
    assert not ran.exists()


def test_sound_weights_in_a_pickle_are_refused_as_well(tiny: Tiny, tmp_path: Path) -> None:
    """The rule is the format, not what one file holds."""
    shutil.copytree(tiny.tower, tmp_path / "m")
    weights = open_weights(str(tiny.tower), lambda own: own)
    torch.save({key: weights[key] for key in weights}, tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_tower(str(tmp_path / "m"))


def test_a_pickled_adapter_is_refused(tiny: Tiny, tmp_path: Path, ran: Path) -> None:
    file, replaces = "adapter_model.bin", "adapter_model.safetensors"
    folder = only_pickled(tiny.stage2, tmp_path / "run", ran, file=file, replaces=replaces)
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors; .*\(safetensors only\)"):
        load_run(folder)
    assert not ran.exists()


def test_a_file_of_weights_for_open_clip_is_read_as_tensors_only(tmp_path: Path, ran: Path) -> None:
    """Its older tags come in torch's own format; what is no tensor in such a file is refused, not called."""
    torch.save({"weight": Bomb(ran)}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="could not load .* which qllava never loads"):
        load_tower(f"open_clip:ViT-B-32/{tmp_path / 'weights.pt'}")
    assert not ran.exists()


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "/etc/passwd", "a/../../b.safetensors"])
def test_an_index_names_files_of_its_folder_only(hf_layout: Path, tmp_path: Path, shard: str) -> None:
    shutil.copytree(hf_layout, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="which is outside its folder"):
        load_llava(str(tmp_path / "m"), dtype=torch.float32)
