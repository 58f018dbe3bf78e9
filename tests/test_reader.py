"""The README typed from top to bottom: every command succeeds, in the order in which it is written."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qllava.pages import server as app
from tests.llm.server import ChatServer
from tests.reader import NOT_RUN, ROOT, Reader, commands, fresh_folder, stand_in_server
from tests.tiny_runs import Tiny

README = ROOT / "README.md"
PAGES = [
    page
    for page in sorted((ROOT / "docs").glob("*.md"))
    if [command for command in commands(page) if not command.startswith(tuple(NOT_RUN))]
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    """What a reader of the pages has by then: a run of nano, one of their own data, and the first of them merged."""
    folder = tmp_path_factory.mktemp("read")
    with pytest.MonkeyPatch.context() as patch:
        typed = Reader(fresh_folder(folder, patch), {}, lambda command: [])
        for command in (
            "make finetune",
            "qllava merge runs/finetune_lora merged",
            "python recipes/finetune_lora.py --train_file mine.json --image_folder photos --output_dir runs/mine",
        ):
            status, said = typed.type(command)
            assert status == 0, said
    return folder


@pytest.fixture
def reader(tmp_path: Path, tiny: Tiny, hf_layout: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    folder = fresh_folder(tmp_path, monkeypatch)
    (folder / "models").mkdir()
    (folder / "models" / "llava-1.5-7b-hf").symlink_to(hf_layout)

    def parts(command: str) -> list[str]:
        """What takes the place of a preset's own parts."""
        if "recipes/llava15" in command:
            return ["--model_name_or_path", str(hf_layout)]
        if "--config recipes/" in command:
            return [
                "--language_model", str(tiny.language_model), "--vision_tower", str(tiny.tower), "--template", "chatml",
            ]  # fmt: skip
        return []

    typed = Reader(folder, {"llava-hf/llava-1.5-7b-hf": str(hf_layout)}, parts)

    def serve(*arguments: object) -> int:
        typed.served.append([str(one) for one in arguments])
        return 0

    monkeypatch.setattr(app, "serve", serve)
    monkeypatch.setattr(app.signal, "signal", lambda *_: None)
    with ChatServer(stand_in_server) as server:
        typed.names["http://127.0.0.1:8000/v1"] = server.url
        yield typed


def type_all(reader: Reader, page: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Type what a page says; returns how many commands were run, all of them with success."""
    typed = 0
    for command in commands(page):
        if any(command.startswith(begun) for begun in NOT_RUN):
            continue
        begun = time.monotonic()
        status, said = reader.type(command)
        with capsys.disabled():
            print(f"{time.monotonic() - begun:6.1f} s  {command.splitlines()[0]}")
        assert status == 0, f"{command}\n{said}"
        assert "Traceback" not in said, f"{command}\n{said}"
        typed += 1
    return typed


def test_the_readme_works_in_its_own_order(reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    assert type_all(reader, README, capsys) >= 15
    assert reader.served, "the demo was never opened"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_works_in_its_own_order(
    page: Path, reader: Reader, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page.read_text(encoding="utf-8")
    made = {"runs/mine": r"--output_dir runs/mine$", "merged": r"^qllava merge \S+ merged$"}
    for name in ("runs/finetune_lora", "runs/mine", "merged"):
        if name not in made or not re.search(made[name], text, re.MULTILINE):  # what a page makes is not there before
            shutil.copytree(finished / name, reader.folder / name)
    assert type_all(reader, page, capsys) >= 1


def test_every_command_of_a_page_is_in_a_block_of_bash() -> None:
    """Blocks of other kinds are not typed, so none of them may hold a command."""
    for page in (README, *PAGES):
        for language, body in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            if language not in ("bash", "python"):
                assert not re.search(r"^(python |qllava |make |accelerate )", body, re.M), (page.name, body)
