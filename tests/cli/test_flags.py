"""Flags that several commands have are written once."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping

import pytest

from qllava.arguments import Parser
from qllava.cli.flags import server_flags
from tests.house_rules import CODE, ROOT, name


def repeated_flags(sources: Mapping[str, str]) -> list[str]:
    """Return the flags that are added in several places with the same arguments, each with its places.

    Args:
        sources: Source text by file name.
    """
    places: dict[str, list[str]] = {}
    for file, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                arguments = ", ".join(map(ast.unparse, [*node.args, *node.keywords]))
                places.setdefault(arguments, []).append(f"{file}:{node.lineno}")
    return [f"{arguments}: {', '.join(where)}" for arguments, where in places.items() if len(where) > 1]


def test_no_flag_of_a_command_is_written_twice() -> None:
    """Not in benchmarks, which are scripts of their own."""
    ours = [path for path in CODE if not path.is_relative_to(ROOT / "benchmarks")]
    found = repeated_flags({name(path): path.read_text(encoding="utf-8") for path in ours})
    assert not found, "\n".join(found)


def test_the_rule_finds_copies() -> None:
    one, other = "p.add_argument('--out', help='x')", "q.add_argument(\n    '--out',\n    help='x',\n)"
    assert repeated_flags({"a.py": one, "b.py": other}) == ["'--out', help='x': a.py:1, b.py:1"]
    assert repeated_flags({"a.py": one, "b.py": one.replace("x", "y")}) == []


def test_flags_of_a_server() -> None:
    parser = Parser()
    server_flags(parser, store="file of replies", temperature=0.5, taken=("model",))
    given = parser.parse_args(["--base-url", "http://127.0.0.1:1/v1", "--parameters", json.dumps({"top_p": 0.9})])
    assert (given.base_url, given.store, given.parameters) == ("http://127.0.0.1:1/v1", None, {"top_p": 0.9})
    assert "0.5" in parser.format_help() and "file of replies" in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["--parameters", json.dumps({"model": "other"})])
