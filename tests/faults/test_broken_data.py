"""Every way in which a data set may be broken, and the sentence that the user reads.

`check` raises nothing; the verdict is no; the sentence names the id, or where none can be read, file and line.
"""

from __future__ import annotations

import errno
import io
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qllava.conversation import CHATML
from qllava.data.check import check
from qllava.data.encode import Encoder
from qllava.data.verdict import Verdict
from tests.faults.broken_data import GPT, HUMAN, REPLACE, SEEN, SOUND, lines
from tests.faults.broken_examples import ROWS
from tests.faults.broken_files import FILES
from tests.faults.broken_images import IMAGES, png
from tests.tiny_models import IMAGE_LAYOUT, make_tiny_tokenizer

CASES = {f"{group}: {name}": case for group, cases in
         {"file": FILES, "row": ROWS, "picture": IMAGES}.items() for name, case in cases.items()}  # fmt: skip


@cache
def encoder() -> Encoder:
    tokenizer = make_tiny_tokenizer()
    return Encoder(tokenizer, CHATML, tokenizer.convert_tokens_to_ids("<image>"), IMAGE_LAYOUT, max_length=512)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLLAVA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for place in (folder, tmp_path):
        (place / "red.png").write_bytes(png())
    return folder


def verdict(path: Path) -> Verdict:
    return Verdict.over([check(path, None, encoder(), progress=False)])


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_in_one_sentence(folder: Path, name: str) -> None:
    case = CASES[name]
    path = folder / case.file
    if callable(case.content):
        case.content(path)
    else:
        content = lines(case.content) if isinstance(case.content, list) else case.content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = verdict(path)
    said = case.said.replace("{folder}", str(path.parent))
    assert [str(problem) for problem in found.problems()] == [said]
    assert not found.ok
    assert "\n" not in said and said.endswith(".")
    told = json.loads(json.dumps(found.as_json()))
    (problem,) = told["problems"]
    assert (problem["id"], problem["line"], problem["file"]) == (case.id, case.line, str(path))
    assert said.endswith(f": {problem['problem']}; {problem['hint']}.")
    assert (problem["severity"], told["ok"], told["samples"]) == (case.severity, False, case.samples)
    assert said in found.text().encode().decode()


def test_there_are_enough_of_them() -> None:
    assert len({case.said.partition(": ")[2] for case in CASES.values()}) >= 40


def test_the_two_halves_of_a_duplicate(folder: Path) -> None:
    """The same example twice is learned twice, which may be meant; that its id is another's may not."""
    (folder / "train.json").write_text(lines([SOUND, SOUND]))
    found = verdict(folder / "train.json")
    assert [str(problem) for problem in found.problems()] == [
        "train.json, example 2, id a1: the example has the same text and the same images as train.json, example 1; "
        "remove one, unless it should count twice.",
        "train.json, example 2, id a1: train.json, example 1 has the same id; give each example an id of its own.",
    ]
    assert not found.ok


def test_all_problems_are_told_together(folder: Path) -> None:
    """Examples, images and comparisons; the sound examples are still counted."""
    (folder / "bad.png").write_bytes(b"")
    rows = [
        SOUND,
        {"id": "b", "conversations": []},
        {"id": "c", "image": "bad.png", "conversations": [SEEN, GPT]},
        {"id": "c", "conversations": [HUMAN, GPT]},
        {"id": "d", "image": "bad.png", "conversations": [SEEN, GPT, HUMAN, GPT]},
    ]
    (folder / "train.json").write_text(lines(rows))
    found = verdict(folder / "train.json")
    assert [(problem.id, problem.kind) for problem in found.problems()] == [
        ("b", "turns"),
        ("c", "image broken"),
        ("c", "duplicate id"),
    ]
    assert f"{folder}/bad.png: this is not an image that can be read (2 examples show it); {REPLACE}." in found.text()
    assert (found.errors, found.as_json()["samples"]) == (2, 4)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(folder: Path) -> None:
    (folder / "train.json").write_text(lines([SOUND]))
    (folder / "train.json").chmod(0)
    assert [str(problem) for problem in verdict(folder / "train.json").problems()] == [
        f"{folder}/train.json: the data file cannot be read (Permission denied); check its name."
    ]


@pytest.mark.parametrize("what", ["train.json", "red.png", "folder"])
def test_what_may_not_be_read_as_the_system_says_it(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Without being another user: opening the file fails, or looking into the folder that it lies in."""
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / what))
    (folder / "train.json").write_text(lines([SOUND]))
    opened, looked_at = io.open, os.stat

    def no_open(file: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, Path | str) and str(file) == str(folder / what):
            raise denied
        return opened(file, *args, **kwargs)

    def no_stat(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).startswith(str(folder)):
            raise denied
        return looked_at(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", no_open)
        patch.setattr("io.open", no_open)
        if what == "folder":
            patch.setattr("os.stat", no_stat)
        found = verdict(folder / "train.json")
    assert not found.ok
    assert [str(problem) for problem in found.problems()] == [
        f"train.json, example 1, id a1: {folder}/red.png: the image cannot be decoded (Permission denied); {REPLACE}."
        if what == "red.png"
        else f"{folder}/train.json: the data file cannot be read (Permission denied); check its name."
    ]
