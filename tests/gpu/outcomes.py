"""A plugin of pytest: each test's outcome goes to the journal as it happens; `-p outcomes`.

Tests with an outcome in the journal are left out, so that a process that died goes on behind the
test that ended it. Where the device is lost, every later test would fail: the process ends.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from journal import Journal

from lolkernels.backends import TABLE

DEVICE_LOST = 75  # as in card.py


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("card")
    group.addoption("--journal", type=Path, required=True)
    group.addoption("--journal-run", required=True)
    group.addoption("--journal-job", required=True)
    group.addoption("--only-backend", help="its tests alone; empty: those of no backend")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(config), "journal-outcomes")


class Outcomes:
    def __init__(self, config: pytest.Config) -> None:
        self.journal = Journal(config.getoption("journal"), config.getoption("journal_run"))
        self.job: str = config.getoption("journal_job")
        self.backend: str | None = config.getoption("only_backend")
        alone = self.backend is None and not config.option.collectonly
        tool = self.job.split()[-1] if alone else ""  # a sanitizer's
        self.prefix = f"{tool} " if tool else ""
        self.seconds = 0.0

    def task(self, nodeid: str, stem: str | None = None) -> str:
        return f"{self.prefix}{stem or self.job.split()[1]}::{nodeid.partition('::')[2]}"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        settled, kept, left = self.journal.settled(), [], []
        for item in items:
            mine = self.backend in (None, backend_of(item))
            stem = item.path.stem if config.option.collectonly else None
            done = self.task(item.nodeid, stem) in settled
            (kept if mine and not done else left).append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=left)
        if config.option.collectonly:
            pairs = sorted({(item.path.name, backend_of(item)) for item in kept})
            self.journal.write("collected", job=self.job, pairs=pairs)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.seconds = 0.0
        self.journal.write("begin", job=self.job, task=self.task(nodeid), limit=90.0)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        more: dict[str, Any] = {}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            more = {
                "outcome": "failed",
                "wrong": short(crash.message if crash else report.longrepr),
            }
        elif report.skipped:
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            more = {"outcome": "skipped", "text": short(text)}
        elif report.when == "call":
            more = {"outcome": "passed"}
        if more:
            task = self.task(report.nodeid)
            self.journal.write(
                "result", job=self.job, task=task, seconds=round(self.seconds, 2), **more
            )
        if report.failed and lost():
            sys.stdout.flush()
            os._exit(DEVICE_LOST)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            task = self.task(f"::collection of {report.nodeid}")
            self.journal.write(
                "result", job=self.job, task=task, outcome="failed", wrong=short(report.longrepr)
            )


def backend_of(item: Any) -> str:
    """The backend among a test's parameters, the first where there are several; empty for none."""
    spec = getattr(item, "callspec", None)
    given = {v for v in spec.params.values() if isinstance(v, str)} if spec else set()
    return next((name for name in TABLE if name in given), "")


def short(text: Any) -> str:
    return " ".join(str(text).split())[-500:]


def lost() -> bool:
    """Whether a kernel has failed in a way that the process cannot go on from."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
