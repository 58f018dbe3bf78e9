"""The newest nano run answers what visitors asked; slow, because it has to be trained first."""

from __future__ import annotations

from pathlib import Path

import pytest

from qllava.config import InputError
from qllava.inference import load
from qllava.runs import RUNS, newest_nano_run
from tests.nano.visitors import read, repeats, score


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_visitors_get_right_answers() -> None:
    try:
        run = newest_nano_run(Path(__file__).resolve().parents[2] / RUNS)
    except InputError as error:
        pytest.skip(str(error))
    results = score(load(str(run)), read())
    wrong = [(asked.question, answer) for asked, answer, right in results if not right]
    about_shapes = [right for asked, _, right in results if asked.about_shapes]
    assert sum(about_shapes) >= 0.85 * len(about_shapes), wrong
    others = [right for asked, _, right in results if not asked.about_shapes]
    assert sum(others) >= 0.95 * len(others), wrong
    assert not [answer for _, answer, _ in results if repeats(answer)]
