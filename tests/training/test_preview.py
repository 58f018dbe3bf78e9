"""`qllava check` and `qllava inspect`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from qllava.cli import main
from tests.tiny_models import IMAGE_TOKENS, make_tiny_records
from tests.tiny_runs import Tiny, write_records

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Two sound examples about one image."""
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (30, 0, 40, 20))  # an image of one colour is noted
    image.save(tmp_path / "a.png")
    made = [
        {"id": f"r{n}", "image": "a.png", "question": question, "answer": "red"}
        for n, question in enumerate(("What colour?", "Which colour is it?"))
    ]
    return write_records(tmp_path / "rows.json", made)


def output(capsys: Capture, *words: Any) -> tuple[int, str]:
    capsys.readouterr()
    status = main([str(word) for word in words])
    return status, capsys.readouterr().out


def test_sound_data_is_ready(rows: Path, tiny: Tiny, capsys: Capture) -> None:
    status, out = output(capsys, "check", rows, "--model", tiny.stage2)
    assert status == 0
    assert out.startswith(f"{rows}: 2 examples, 2 samples, 1 image, each in 2.0 samples; tokens median ")
    assert "Tokens of a sample\n" in out
    assert out.endswith("\nReady: every example is learned as it is written.\n")


def test_the_json_has_the_keys_that_others_read(rows: Path, tiny: Tiny, capsys: Capture) -> None:
    status, out = output(capsys, "check", rows, "--model", tiny.stage2, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["ok"] is True and found["problems"] == []
    assert (found["samples"], found["images"], found["samples_per_image"]) == (2, 1, 2.0)
    assert found["tokens"]["min"] <= found["tokens"]["median"] <= found["tokens"]["p95"] <= found["tokens"]["max"]
    _, inspected = output(capsys, "inspect", rows, "--model", tiny.stage2, "--json")
    samples = [json.loads(line) for line in inspected.splitlines()]
    assert found["learned_tokens"] == sum(label != -100 for s in samples for label in s["labels"])
    assert found["tokens"]["max"] == max(len(s["input_ids"]) for s in samples) + IMAGE_TOKENS - 1


def test_problems_of_several_files_and_leaks(rows: Path, tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    bad = write_records(tmp_path / "bad.json", [{"id": "b", "question": "a", "answer": ""}, {"id": "r0"}])
    status, out = output(
        capsys, "check", rows, bad, "--eval-file", rows, "--model", tiny.stage2, "--image-folder", tmp_path, "--json"
    )
    found = json.loads(out)
    assert (status, found["ok"], found["samples"]) == (1, False, 2)
    assert [(p["kind"], p["id"], Path(p["file"]).name, p["line"]) for p in found["problems"]] == [
        ("empty", "b", "bad.json", 1),
        ("not an example", "r0", "bad.json", 1),
        ("in the evaluation", "r0", "rows.json", 1),
        ("in the evaluation", "r1", "rows.json", 1),
    ]


def test_a_row_too_long_is_told(rows: Path, tiny: Tiny, capsys: Capture) -> None:
    status, out = output(capsys, "check", rows, "--model", tiny.stage2, "--max-length", 20)
    assert status == 1
    assert "error: too long (2)" in out and "more than max_length 20; raise max_length" in out
    assert out.endswith("Not ready: 2 of these problems are errors; fix them before training.\n")


def test_a_recipe_is_checked_as_it_would_be_trained(tiny: Tiny, rows: Path, tmp_path: Path, capsys: Capture) -> None:
    captions = write_records(
        tmp_path / "captions.json", [{"id": "c", "image": "a.png", "question": "What?", "answer": "a red image"}]
    )
    recipe = {
        "language_model": str(tiny.language_model),
        "vision_tower": str(tiny.tower),
        "train_file": [{"path": str(rows), "repeat": 2}],
        "pretrain_file": str(captions),
        "max_length": 40,
        "too_long": "drop",
        "fp16": True,  # of the machine that will train
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    status, out = output(capsys, "check", "--config", tmp_path / "recipe.yaml", "--json")
    found = json.loads(out)
    dropped = [p["id"] for p in found["problems"] if p["kind"] == "dropped"]
    assert found["samples"] == 3 - len(dropped)
    assert status == (1 if dropped else 0)


def test_a_recipe_without_data_and_a_command_without_either(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "recipe.yaml").write_text("lora_r: 4\n", encoding="utf-8")
    for words, message in (
        (["check", "--config", str(tmp_path / "recipe.yaml")], "has no train_file"),
        (["check"], "Give either the data to check or a recipe with --config"),
    ):
        capsys.readouterr()
        assert main(words) == 1
        assert message in capsys.readouterr().err


def test_inspect_in_the_terminal_shows_the_first_rows(rows: Path, tiny: Tiny, capsys: Capture) -> None:
    status, out = output(capsys, "inspect", rows, "--model", tiny.stage2, "--rows", 1)
    assert status == 0
    assert "rows.json, example 1, id r0" in out and "id r1" not in out
    assert f"<image ×{IMAGE_TOKENS}>" in out


def test_inspect_as_a_page(tmp_path: Path, tiny: Tiny, capsys: Capture) -> None:
    data = make_tiny_records(tmp_path)
    page = tmp_path / "page.html"
    status, out = output(capsys, "inspect", data, "--model", tiny.stage2, "--html", page)
    assert status == 0 and out.startswith(f"Wrote {page} with ")
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png") >= 1 and "Learned" in text
    assert main(["inspect", str(data), "--model", str(tiny.stage2), "--html", str(tmp_path / "no" / "page.html")]) == 1


def test_inspect_of_nothing_and_of_a_broken_row(tmp_path: Path, tiny: Tiny, capsys: Capture) -> None:
    for content, message in (
        ([], "the file contains no examples"),
        ([{"id": "x"}], "example 1, id x: an example has one of the keys"),
    ):
        data = write_records(tmp_path / "data.json", content)
        capsys.readouterr()
        assert main(["inspect", str(data), "--model", str(tiny.stage2)]) == 1
        assert message in capsys.readouterr().err
