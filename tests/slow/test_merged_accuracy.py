"""A merged nano answers held-out questions as well as the run that it was merged from."""

from __future__ import annotations

from pathlib import Path

import pytest

from qllava.config import InputError
from qllava.data.formats import read_examples
from qllava.evaluation.vqa import evaluate
from qllava.inference import load
from qllava.merge import merge
from qllava.nano import dataset
from qllava.runs import RUNS, newest_nano_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_merged_nano_is_as_good(tmp_path: Path) -> None:
    try:
        run = newest_nano_run(ROOT / RUNS)
    except InputError as error:
        pytest.skip(str(error))
    merged = tmp_path / "merged"
    assert merge(run, merged, base="nf4", dtype="bfloat16", max_shard_size="5GB", verify=True).verified
    data = dataset.prepare()
    examples = list(read_examples(data.test, data.folder))
    trained, whole = (evaluate(load(str(folder)), examples, batch_size=50) for folder in (run, merged))
    assert trained.n == whole.n == 1000
    assert abs(trained.accuracy - whole.accuracy) <= 0.005
