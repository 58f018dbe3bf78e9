"""Fixtures for tests of data: a folder with two images, and a separate cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.container_files import BLUE, RED


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a cache in the test's folder, so that images are unpacked there."""
    monkeypatch.setenv("QLLAVA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path, own_cache: None) -> Path:
    """Return a folder for data files that contains red.png and blue.png."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "red.png").write_bytes(RED)
    (folder / "blue.png").write_bytes(BLUE)
    return folder
