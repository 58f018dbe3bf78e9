"""An image from outside starts no other program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from qllava.data.images import open_image
from qllava.data.problems import RecordError
from qllava.training.report import write_report


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_ghostscript_is_not_called(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the file holds, whatever it is called."""
    Image.new("RGB", (8, 8)).save(tmp_path / name, format="EPS")
    called: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **_: called.append(given))
    with pytest.raises(RecordError, match="EPS is a program and not an image"):
        open_image(tmp_path / name)
    assert not called
    with Image.open(tmp_path / name) as image, pytest.raises(Exception):  # noqa: B017  # the check can fail
        image.load()
    assert called


def test_a_report_calls_it_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", format="EPS")
    (tmp_path / "samples.json").write_text(json.dumps([{"image": "a.png", "question": "?", "truth": "!"}]))
    called: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **_: called.append(given))
    write_report(tmp_path)
    assert not called and "a.png cannot be opened." in (tmp_path / "report.html").read_text(encoding="utf-8")
