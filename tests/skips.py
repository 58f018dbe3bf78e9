"""Reasons for which continuous integration may skip tests; any other skip fails its run.

`.ci/run` sets QLLAVA_CI to what it could install: "complete" or "without-chromium". After the run, each test that was
skipped for a reason that is not listed below is named, so that no part of the suite is skipped unnoticed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# Part of a reason, and why it can occur on a machine that `.ci/run` has set up.
ALLOWED = {
    "llama-cpp-python is not installed": "it is built from source; `make interop` tests it",
    "only root": "who runs the tests may be another user",
    "root may read everything": "who runs the tests may be root",
    "spaCy": "an extra of ours that is not installed with the tools",
    "shellcheck is not installed": "a program that no make target installs",
    "deepspeed is not installed": "an extra of ours; it needs a compiler",
    "a C++ compiler": "a bare machine has none",
}


def allowed(reason: str, ci: str, shared: bool) -> bool:
    """Return whether a test may be skipped for this reason; `shared` tells whether `../shared` exists."""
    if "../shared" in reason:
        return not shared
    if "chromium is not installed" in reason:
        return ci == "without-chromium"
    return any(part in reason for part in ALLOWED)


def unexpected(skips: Iterable[tuple[str, str]], ci: str, *, shared: bool) -> list[str]:
    """Return a sentence for each (test, reason) that may not be skipped."""
    return [
        f"{test} was skipped ({reason}), but continuous integration must run it: install what it needs, or add the "
        "reason to tests/skips.py."
        for test, reason in dict.fromkeys(skips)
        if not allowed(reason, ci, shared)
    ]


def found(config: pytest.Config) -> list[str]:
    """Return the sentences about tests that this run skipped; none outside of continuous integration."""
    ci = os.environ.get("QLLAVA_CI", "")
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if not ci or reporter is None:
        return []
    skips = []
    for report in reporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):  # otherwise an expected failure
            skips.append((report.nodeid, str(report.longrepr[2]).removeprefix("Skipped: ")))
    return unexpected(skips, ci, shared=SHARED.is_dir())


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if there are such skips, before pytest prints its summary; xdist's workers see only their own."""
    if session.exitstatus == pytest.ExitCode.OK and found(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print each of these sentences in the summary."""
    sentences = found(config)
    if sentences:
        terminalreporter.section("skipped, but expected to run", red=True)
        for sentence in sentences:
            terminalreporter.line(sentence)
