"""From a name to a model: folders, runs, `nano`, and what is said when there is none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qllava.config import NANO_IDENTITY, InputError
from qllava.inference import Chat, Loading, load, load_as, load_pair, loading
from qllava.runs import newest_nano_run
from tests.tiny_models import make_image, make_tiny_llava, make_tiny_model, make_tiny_processor, save_llava


def finished_run(folder: Path, *, model: str = "nano", when: int = 0, identity: str = NANO_IDENTITY) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(f"model_name_or_path: {model}\n")
    (folder / "results.json").write_text("{}")
    (folder / "qllava.json").write_text(json.dumps({"fingerprint": f"shapes-vocabulary-{identity}"}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    os.utime(folder / "results.json", (when, when))
    return folder


def test_a_folder_of_plain_transformers(tmp_path: Path) -> None:
    chat = load(str(make_tiny_llava(tmp_path / "model")))
    processor = make_tiny_processor()
    expected = Chat(make_tiny_model(processor), processor, "memory")
    assert not chat.model.training
    assert chat.answer(make_image("red"), "What?", max_new_tokens=10) == expected.answer(
        make_image("red"), "What?", max_new_tokens=10
    )


def test_a_merged_folder_in_the_hub_s_layout(tmp_path: Path) -> None:
    processor = make_tiny_processor()
    model = make_tiny_model(processor)
    save_llava(model, processor, tmp_path / "merged")
    expected = Chat(model, processor, "memory").answer(make_image("red"), "What?", max_new_tokens=10)
    assert load(str(tmp_path / "merged")).answer(make_image("red"), "What?", max_new_tokens=10) == expected


def test_four_bit_is_for_the_language_model_only(tmp_path: Path) -> None:
    model = load(str(make_tiny_llava(tmp_path / "model")), load_in_4bit=True).model
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(quantized) == 14
    assert all(".language_model." in name for name in quantized)


def test_the_newest_finished_nano_run(tmp_path: Path) -> None:
    finished_run(tmp_path / "old", when=100)
    newest = finished_run(tmp_path / "new", when=200)
    finished_run(tmp_path / "another_model", model="some/folder", when=300)
    unfinished = finished_run(tmp_path / "unfinished", when=400)
    (unfinished / "adapter_model.safetensors").unlink()
    assert newest_nano_run(tmp_path) == newest


def test_a_run_on_another_nano_is_refused(tmp_path: Path) -> None:
    other = finished_run(tmp_path / "other", when=200, identity="another")
    with pytest.raises(InputError, match=rf"{other} was trained on another version of nano.*make finetune ARGS="):
        newest_nano_run(tmp_path)
    usable = finished_run(tmp_path / "usable", when=100)
    assert newest_nano_run(tmp_path) == usable


def test_no_nano_run_says_make_finetune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="make finetune"):
        load("nano")


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), str(tmp_path / "missing"), "./missing", "missing"):
        with pytest.raises(InputError, match=name):
            load(name)


def test_a_run_that_has_not_finished(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "half")
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="is not finished"):
        load(str(run))


def test_a_damaged_run_yaml_is_named(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "broken")
    (run / "run.yaml").write_text("a: [")
    with pytest.raises(InputError, match=r"run\.yaml cannot be read"):
        newest_nano_run(tmp_path)


def test_a_moved_base_is_for_the_runs_of_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models are loaded in the same way; only one that has a base is told where it is now."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def stand_in(model: str, **how: Any) -> Chat:
        calls.append((model, how))
        return Chat(None, None, model)  # type: ignore[arg-type]  # nothing is asked

    monkeypatch.setattr(loading, "load", stand_in)
    monkeypatch.setattr(loading, "has_base", lambda model: model == "run")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    how = Loading(load_in_4bit=None, dtype="float16", base_model=("there",), recommended_sampling=True)
    first, second = load_pair("run", "merged", how)
    same = {"load_in_4bit": True, "dtype": "float16"}
    assert calls == [("run", {**same, "base_model": ("there",)}), ("merged", {**same, "base_model": ()})]
    assert first.recommended_sampling and second.recommended_sampling
    one, other = load_pair("merged", "merged", how)
    assert one is other and len(calls) == 3
    load_as("merged", how)  # alone: refused by `load`, as the base would not be used
    assert calls[-1][1]["base_model"] == ("there",)
