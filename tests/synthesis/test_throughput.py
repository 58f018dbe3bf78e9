"""The benchmark of throughput at no size: it runs, and it would notice a call that is lost or doubled."""

from __future__ import annotations

import pytest

from benchmarks import synthesis_throughput
from benchmarks.synthesis_throughput import measure
from qllava.synthesis import pipeline


def test_a_small_run_stays_below_the_limit() -> None:
    found = measure(4, 0.05, 12)
    assert found["limit_per_second"] == 80
    assert 0 < found["whole"] <= found["ratio"] <= 1


def test_a_call_that_is_made_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(job: pipeline.Job, url: str, **limits: int) -> pipeline.Result:
        run(job, url, **limits)
        job.store.unlink()
        return run(job, url, **limits)

    run = pipeline.run
    monkeypatch.setattr(synthesis_throughput.pipeline, "run", twice)
    with pytest.raises(SystemExit, match="12 calls, 24 answers"):
        measure(4, 0.01, 12)
