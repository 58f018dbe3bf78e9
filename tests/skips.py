"""Which tests continuous integration may skip, and why; any other skip fails its run.

`.ci/run` sets QLLAVA_CI to what it could install: "complete", or "without-chromium". After the run each test that was
skipped for another reason than those below is named, so that no part of the suite goes quiet unseen.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# A part of the reason -> why a machine that is set up as `.ci/run` does it may lack this.
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
    """Whether a test may be skipped for this reason, where `../shared` is there or not."""
    if "../shared" in reason:
        return not shared
    if "chromium is not installed" in reason:
        return ci == "without-chromium"
    return any(part in reason for part in ALLOWED)


def unexpected(skips: Iterable[tuple[str, str]], ci: str, *, shared: bool) -> list[str]:
    """A sentence for each (test, reason) that may not be skipped."""
    return [
        f"{test} was skipped ({reason}), but continuous integration must run it: install what it needs, or add the "
        "reason to tests/skips.py."
        for test, reason in dict.fromkeys(skips)
        if not allowed(reason, ci, shared)
    ]


def found(config: pytest.Config) -> list[str]:
    """The sentences about what this run skipped; none outside of continuous integration."""
    ci = os.environ.get("QLLAVA_CI", "")
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if not ci or reporter is None:
        return []
    skips = []
    for report in reporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):  # else it is an expected failure
            skips.append((report.nodeid, str(report.longrepr[2]).removeprefix("Skipped: ")))
    return unexpected(skips, ci, shared=SHARED.is_dir())


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let the run fail; pytest prints its summary after this. A process of pytest-xdist's has no reports of others."""
    if session.exitstatus == pytest.ExitCode.OK and found(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name each of them."""
    sentences = found(config)
    if sentences:
        terminalreporter.section("skipped, but expected to run", red=True)
        for sentence in sentences:
            terminalreporter.line(sentence)
