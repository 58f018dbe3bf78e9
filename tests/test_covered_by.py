"""The rule about tests of modules finds what it is there for; test_house.py holds it."""

from __future__ import annotations

from tests.covered_by import COVERED_BY, own, problems


def test_what_is_wrong_with_a_line_is_said() -> None:
    assert own("qllava/data/encode.py") == ["tests/data/test_encode.py"]
    assert own("recipes/ablate.py") == ["tests/test_ablate.py"]
    wrong = {
        "qllava/data/encode.py": "tests/data/test_encode.py",
        "qllava/doctor.py": "tests/data/test_encode.py",
        "qllava/config.py": "tests/no_such.py",
        "qllava/gone.py": "tests/test_cli.py",
    }
    table = {name: test for name, test in COVERED_BY.items() if name != "demo/app.py"}
    assert problems({**table, **wrong}) == [
        "qllava/config.py is said to be tested by tests/no_such.py, which does not exist.",
        "qllava/data/encode.py has a test file of its own name; remove its line from tests/covered_by.py.",
        "qllava/doctor.py is said to be tested by tests/data/test_encode.py, which neither imports nor runs it.",
        "demo/app.py has no tests/test_app.py, and no line in tests/covered_by.py says what tests it.",
        "qllava/gone.py has a line in tests/covered_by.py and does not exist.",
    ]
