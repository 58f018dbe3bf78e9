"""Images inside data files are unpacked once, by their content."""

from __future__ import annotations

import hashlib
import io
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from qllava.config import InputError
from qllava.data.unpacked import unpack
from tests.data.container_files import RED
from tests.planted import full, planted

pytestmark = pytest.mark.usefixtures("own_cache")


class TestUnpack:
    @pytest.mark.parametrize(
        ("form", "suffix"),
        [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("GIF", ".gif"), ("BMP", ".bmp"), ("TIFF", ".tif")],
    )
    def test_it_is_named_by_what_it_holds(self, tmp_path: Path, form: str, suffix: str) -> None:
        file = io.BytesIO()
        Pillow.new("RGB", (4, 4)).save(file, form)
        digest = hashlib.sha256(file.getvalue()).hexdigest()
        path = unpack(file.getvalue())
        assert path == tmp_path / "cache" / "pictures" / digest[:2] / f"{digest[:32]}{suffix}"
        assert path.read_bytes() == file.getvalue()
        assert unpack(b"what is this").suffix == ".bin"

    def test_it_is_written_once_and_mended_when_it_is_cut_off(self) -> None:
        path = unpack(RED)
        before = path.stat()
        assert unpack(RED) == path
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
        path.write_bytes(b"")
        assert unpack(RED).read_bytes() == RED

    def test_many_may_write_at_the_same_time(self, tmp_path: Path) -> None:
        start, data = threading.Barrier(8), bytes(1 << 16)
        seen: list[int] = []

        def write() -> None:
            start.wait()
            seen.append(len(unpack(data).read_bytes()))

        threads = [threading.Thread(target=write) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [1 << 16] * 8
        assert len([p for p in (tmp_path / "cache").rglob("*") if p.is_file()]) == 1

    @pytest.mark.parametrize("operation", ["write", "rename"])
    def test_what_cannot_be_finished_leaves_nothing(self, tmp_path: Path, operation: Any) -> None:
        said = "No space left on device"
        with planted(operation, f"{tmp_path}/cache/*", full), pytest.raises(InputError, match=said):
            unpack(RED)
        assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("in the way")
        with pytest.raises(InputError) as error:
            unpack(RED)
        assert str(error.value) == (
            f"{tmp_path}/cache/pictures: the images of the data file cannot be unpacked here (Not a directory); "
            "free disk space, or set QLLAVA_CACHE to another folder."
        )
