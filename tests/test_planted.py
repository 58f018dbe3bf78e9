"""A planted fault happens at the operation and path that are named and at no other; one that never happens fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.planted import full, interrupted, planted


def test_each_operation(tmp_path: Path) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    with planted("write", f"{tmp_path}/file", full):
        for write in (lambda: file.write_text("x"), lambda: os.close(os.open(file, os.O_CREAT | os.O_WRONLY))):
            with pytest.raises(OSError, match="No space left on device"):
                write()
        other.write_text("x")
    assert not file.exists() and other.read_text() == "x"
    with planted("rename", "*/file", interrupted):
        for rename in (other.rename, other.replace):
            with pytest.raises(KeyboardInterrupt):
                rename(file)
    with planted("read", "*/other", full), pytest.raises(OSError, match="No space"):
        other.read_text()
    with planted("mkdir", "*/folder", full), pytest.raises(OSError, match="No space"):
        (tmp_path / "folder").mkdir()
    with planted("chmod", "*/other", full), pytest.raises(OSError, match="No space"):
        other.chmod(0o600)
    assert other.read_text() == "x", "all is over"


def test_a_fault_that_never_happens_fails_the_test(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nothing did write"), planted("write", "*/file", full):
        (tmp_path / "other").write_text("x")
