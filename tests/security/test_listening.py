"""The demo is reached from this machine only, whatever the environment proposes to Gradio."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.house_rules import CODE, name
from tests.pages.server import ROOT, served
from tests.security.test_source import calls, constant
from tests.tiny_models import make_tiny_llava

LISTEN = "0A"  # the state in /proc/net/tcp
LOOPBACK = ("0100007F", "00000000000000000000000001000000")


def listening(port: int) -> set[str]:
    """The addresses on which this machine listens at a port, as the kernel writes them."""
    found = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.is_file() else ():
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            found |= {address} if state == LISTEN and int(number, 16) == port else set()
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="this system has no /proc/net/tcp to look into")
def test_it_listens_on_the_loopback_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    with served(make_tiny_llava(tmp_path / "model"), fresh=True) as (address, _):
        found = listening(int(address.rpartition(":")[2]))
    assert found and found <= set(LOOPBACK)


def test_one_place_serves_and_it_names_the_loopback() -> None:
    """And `share`, which leads out of this machine, is what the user said, not what is in GRADIO_SHARE."""
    found = []
    for path in (one for one in CODE if not name(one).startswith("benchmarks/")):
        for _, called, keywords in calls(path.read_text(encoding="utf-8")):
            if called.endswith(".launch") or "server_name" in keywords:
                found.append(name(path))
                assert constant(keywords["server_name"]) == "127.0.0.1"
                assert ast.unparse(keywords["share"]) == "options.share"
    assert found == ["qllava/pages/server.py"]
    assert 'add_argument("--share", action="store_true"' in (ROOT / "qllava" / "pages" / "server.py").read_text(
        encoding="utf-8"
    )
