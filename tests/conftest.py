# SPDX-License-Identifier: Apache-2.0
"""Rules for every test: in CI an unexpected skip is a failure, and hypothesis is deterministic there.

A test that stops running because a program is missing protects nothing, and nobody notices.  So with CI=true
each reason for a skip must match a line of expected-skips.txt.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
EXPECTED = Path(__file__).with_name("expected-skips.txt")

settings.register_profile("default", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if IN_CI else "default"))

_unexpected: list[str] = []


def patterns(text: str) -> list[str]:
    """The patterns of an expected-skips file: its lines without blank ones and comments."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """Why this report is a skip; None when it is not one (an expected failure is not)."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return None
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def _judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = skip_reason(report)
    if not IN_CI or reason is None:
        return
    if not any(fnmatch.fnmatchcase(reason, pattern) for pattern in patterns(EXPECTED.read_text())):
        _unexpected.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Judge the skip of one test."""
    _judge(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Judge the skip of a whole module."""
    _judge(report)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Fail a run that passed but skipped something nobody expected."""
    if _unexpected and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the unexpected skips."""
    if _unexpected:
        terminalreporter.section("skips that tests/expected-skips.txt does not expect", red=True)
        for line in _unexpected:
            terminalreporter.write_line(line)
