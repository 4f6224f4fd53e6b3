"""A plugin of pytest that writes what a rank does, test by test, into a file as it happens."""

import asyncio
import inspect
import json
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

import pytest

from tests.upstream.results import FAILED, PASSED, SKIPPED

_LEFT_OUT = ("flaky", "flaky_in_dev")
"""Upstream's CI does not run what is marked so."""
_LONGEST = 1500
"""Characters of an error that are kept."""


class Recorder:
    """Events, one JSON a line: `tests` collected, a test `at` its start, `done` and how."""

    def __init__(self, events: Path, wanted: Collection[str] | None) -> None:
        """wanted: tests to run, None for all of the file."""
        self.events, self.wanted = events, wanted
        self.outcome, self.error, self.seconds = PASSED, "", 0.0

    def write(self, **event: Any) -> None:
        """Append one event."""
        with self.events.open("a", encoding="utf-8") as out:
            out.write(json.dumps(event) + "\n")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep what is asked for."""
        items[:] = [
            item
            for item in items
            if (self.wanted is None or self._name(item.nodeid) in self.wanted)
            and not any(item.get_closest_marker(mark) for mark in _LEFT_OUT)
        ]
        self.write(tests=[self._name(item.nodeid) for item in items])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        if report.failed:
            lines = [
                line[1:].strip() for line in str(report.longrepr).splitlines() if line[:1] == "E"
            ]
            error = (lines or str(report.longrepr).splitlines() or [""])[-1]
            self.write(done=self._name(report.nodeid), outcome=FAILED, error=error, seconds=0.0)
        elif report.skipped:
            error = _skipped(report.longrepr)
            self.write(done=self._name(report.nodeid), outcome=SKIPPED, error=error, seconds=0.0)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self.outcome, self.error, self.seconds = PASSED, "", 0.0
        self.write(at=self._name(nodeid))

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Upstream runs what it marks as experimental with a flag, in a pass of its own."""
        item.config.option.experimental = item.get_closest_marker("experimental") is not None

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        """Coroutines run without pytest-asyncio."""
        if not inspect.iscoroutinefunction(pyfuncitem.obj):
            return None
        names = inspect.signature(pyfuncitem.obj).parameters
        asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Setup, call and teardown: the first failure counts."""
        report = yield
        self.seconds += report.duration
        if report.failed and self.outcome != FAILED:
            self.outcome, self.error = FAILED, _failure(call, report)
        elif report.skipped and self.outcome == PASSED:
            self.outcome, self.error = SKIPPED, _skipped(report.longrepr)
        return report

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """A test is over."""
        self.write(
            done=self._name(nodeid), outcome=self.outcome, error=self.error, seconds=self.seconds
        )

    def _name(self, nodeid: str) -> str:
        return nodeid.removeprefix("tests/unit_tests/")


def _failure(call: pytest.CallInfo[None], report: pytest.TestReport) -> str:
    if call.excinfo is None:  # a strict xfail that passes
        return one_line(str(report.longrepr))
    error, last = call.excinfo.value, call.excinfo.traceback[-1]
    path = str(last.path)
    for root in ("site-packages/", "tests/unit_tests/"):
        path = path.rpartition(root)[2]
    return f"{one_line(f'{type(error).__name__}: {error}')} @ {path}:{last.name}"


def one_line(text: str) -> str:
    """Text with its spaces and line ends made one, shortened."""
    return " ".join(text.split())[:_LONGEST]


def _skipped(longrepr: Any) -> str:
    return one_line(str(longrepr[2] if isinstance(longrepr, tuple) else longrepr))
