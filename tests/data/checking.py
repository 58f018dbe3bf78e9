"""Helpers of the tests of `check`: a folder of images, examples about them, and the result of a check."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from PIL import Image

from qllava.conversation import CHATML
from qllava.data.check import Checked, check
from qllava.data.encode import Encoder
from tests.tiny_models import IMAGE_LAYOUT, make_tiny_processor

SEEN, ASKED, SAID = "<image>\nWhat is it?", "Where?", "A bus."


@cache
def encoder(**more: Any) -> Encoder:
    tokenizer = make_tiny_processor().tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    return Encoder(tokenizer, CHATML, image, IMAGE_LAYOUT, **{"max_length": 512, **more})


def images_in(folder: Path) -> Path:
    """Make a folder for data files with red.png, blue.png and deep/green.png, and return it."""
    (folder / "deep").mkdir(parents=True)
    for name, colour in (("red.png", "red"), ("blue.png", "blue"), ("deep/green.png", "green")):
        image = Image.new("RGB", (20, 12), colour)
        image.putpixel((0, 0), (255, 255, 255))  # an image of a single colour gets a note
        image.save(folder / name)
    return folder


def looked_at(path: Path, made: Encoder | None = None, **more: Any) -> Checked:
    return check(path, None, made or encoder(), progress=False, **more)


def said(checked: Checked) -> list[str]:
    return [str(problem) for problem in checked.problems()]


def turns(*words: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": said} for n, said in enumerate(words)]


def llava(*words: str, **more: Any) -> dict[str, Any]:
    return {"conversations": turns(*words), **more}


def lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


ROWS: list[dict[str, Any]] = [
    llava(SEEN, "Ein „Bus“.", id="one", image="red.png"),
    llava(ASKED, "Here\u2028or\u0085there \U0001f68c.", id="two"),
    llava("Hello", "Ho", "<image>\nAnd this?", "Blue.", id="three", image="blue.png"),
]


def saved(path: Path) -> None:
    turn = {"from": Value("string"), "value": Value("string")}
    features = Features({"id": Value("string"), "image": Value("string"), "conversations": List(turn)})
    Dataset.from_list([{"image": None} | row for row in ROWS], features=features).save_to_disk(path)
    for name in ("red.png", "blue.png"):
        (path / name).write_bytes((path.parent / name).read_bytes())


LIST, PRETTY = json.dumps(ROWS), json.dumps(ROWS, indent=4, ensure_ascii=False)


def learned(checked: Checked) -> list[Any]:
    """Return what the trainer gets, with the bytes of images instead of their paths."""
    rows = checked.table.with_transform(checked.layout)[:]
    images = [[Path(name).read_bytes() for name in names] for names in rows["image_files"]]
    return list(zip(rows["id"], rows["input_ids"], rows["labels"], images, strict=True))
