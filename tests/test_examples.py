"""The example data is what its program draws, and is ready to be trained on."""

from __future__ import annotations

import filecmp
import json
import runpy
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from qllava.cli import main

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_the_files_are_those_that_are_drawn(tmp_path: Path) -> None:
    runpy.run_path(str(EXAMPLES / "draw.py"))["draw_all"](tmp_path)
    drawn = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    there = {path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*.*") if path.suffix in (".png", ".json", ".jsonl")}
    assert drawn == there and len(drawn) == 24 + 3 + 4
    for name in drawn:
        if name.suffix == ".png":
            assert ImageChops.difference(Image.open(tmp_path / name), Image.open(EXAMPLES / name)).getbbox() is None
        else:
            assert filecmp.cmp(tmp_path / name, EXAMPLES / name, shallow=False), name


def test_the_examples_are_ready_and_their_answers_follow_from_the_contexts(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["check", str(EXAMPLES / "mine.json"), "--image-folder", str(EXAMPLES / "images")]
    assert main([*command, "--eval-file", str(EXAMPLES / "held_out.json")]) == 0
    assert "Ready: every example is learned as it is written." in capsys.readouterr().out
    contexts = {one["id"]: one for one in map(json.loads, (EXAMPLES / "contexts.jsonl").read_text().splitlines())}
    for name in ("mine.json", "held_out.json"):
        for example in json.loads((EXAMPLES / name).read_text()):
            kinds = [box["category"] for box in contexts[example["id"]]["boxes"]]
            asked, said = (turn["value"] for turn in example["conversations"][:2])
            counted = asked.removeprefix("<image>\nHow many ").removesuffix("s are there?")
            assert ("no", "one", "two", "three")[kinds.count(counted)] == said
            asked, said = (turn["value"] for turn in example["conversations"][4:])
            assert (said == "yes") == (asked.split()[3] in kinds)
