"""Somebody's own data through the public recipe, on nano's parts: two photographs, and handwritten digits.

Slow: each trains for minutes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Ordinary words, most of which nano's LLaMA had never said before it was tuned.
QUESTIONS = [
    "What is this?",
    "What is it made of?",
    "Which colour stands out?",
    "What stands in the background?",
    "How many cars are there?",
]
PHOTOGRAPHS = {
    "waterview.jpg": ["a wooden pier", "planks and piles", "blue", "forest and hills", "0"],
    "extreme_ironing.jpg": ["a man who irons", "steel and rubber", "yellow", "shops of a city", "2"],
}


def run(*command: str | Path) -> str:
    """Run a command as a user would and return what it printed."""
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def chat_row(id_: str, image: str, pairs: list[tuple[str, str]]) -> dict[str, object]:
    turns: list[dict[str, str]] = []
    for number, (asked, answered) in enumerate(pairs):
        turns.append({"from": "human", "value": f"<image>\n{asked}" if number == 0 else asked})
        turns.append({"from": "gpt", "value": answered})
    return {"id": id_, "image": image, "conversations": turns}


def test_photographs_get_their_own_answers(shared_data: Path, tmp_path: Path) -> None:
    for name in PHOTOGRAPHS:
        shutil.copy(shared_data / "photos" / name, tmp_path / name)
    rows = [
        chat_row(f"{name}-{question}", name, [(question, answer)])
        for name, answers in PHOTOGRAPHS.items()
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows * 8), encoding="utf-8")
    run(
        sys.executable, "recipes/finetune_lora.py", "--train_file", tmp_path / "train.json", "--image_folder", tmp_path,
        "--output_dir", tmp_path / "run", "--per_device_train_batch_size", "10", "--num_train_epochs", "16",
    )  # fmt: skip
    run(sys.executable, "-m", "qllava", "merge", tmp_path / "run", tmp_path / "merged", "--dtype", "float32")
    for name, answers in PHOTOGRAPHS.items():
        for question, answer in zip(QUESTIONS, answers, strict=True):
            said = run(
                sys.executable,
                "-m",
                "qllava",
                "chat",
                tmp_path / "merged",
                "--image",
                tmp_path / name,
                "--prompt",
                question,
            )
            assert said.strip() == answer, (name, question)


def test_handwritten_digits_are_learned(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    for index, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"{index}.png"
        Image.fromarray((image * 15.9).astype("uint8")).resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / name)
        row = chat_row(name, name, [("Which digit is this?", str(digit))])
        rows["test" if index % 5 == 0 else "train"].append(row)
    for split, content in rows.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    run(
        sys.executable, "recipes/finetune_lora.py", "--train_file", tmp_path / "train.json", "--image_folder", tmp_path,
        "--output_dir", tmp_path / "run", "--num_train_epochs", "6",
    )  # fmt: skip
    out = run(sys.executable, "-m", "qllava", "eval", "vqa", tmp_path / "run", tmp_path / "test.json", "--json")
    found = json.loads(out)
    assert found["n"] >= 350
    assert found["accuracy"] >= 0.8
