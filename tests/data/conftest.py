"""A folder with two images, and a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.container_files import BLUE, RED


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are unpacked into a folder of the test."""
    monkeypatch.setenv("QLLAVA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path, own_cache: None) -> Path:
    """A folder for data files, with red.png and blue.png in it."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "red.png").write_bytes(RED)
    (folder / "blue.png").write_bytes(BLUE)
    return folder
