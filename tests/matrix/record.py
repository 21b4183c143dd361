# SPDX-License-Identifier: Apache-2.0
"""What became of every case of the feature matrix, for ``tests/matrix/table.py``: one JSON file a test in
``work/matrix/``.

A test says which case of the scope table it is by a mark, ``@pytest.mark.scope(setting, row)``, in which ``{name}``
stands for its parameters. What it notes by ``record_property`` under one of the names in ``NOTED`` goes beside the
outcome.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from vllm_hidden_transfer.machine import this_machine

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "work" / "matrix"
NOTED = ("outcome", "acceptance_length", "sentence")
WORKS, FAILS, DID_NOT_END, SKIPPED = "works", "fails", "did not end", "skipped"
FORCED = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Variables that make a CPU behave as a lesser one."""


@functools.cache
def commit(root: Path = ROOT) -> str:
    """The checkout's commit, with "+changes" where the tree is not that commit's; "unknown" outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        name = git("rev-parse", "--short=7", "HEAD")
        return name + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def cpu_kind() -> str:
    """The CPU's name and its widest vector set, and what the environment takes away from it."""
    forced = [f"{name}={os.environ[name]}" for name in FORCED if name in os.environ]
    return ", ".join([str(this_machine()), *forced])


class Recorder:
    """A pytest plugin: writes what became of every test with the mark.

    A record is there from the moment a test starts, as one that did not end, so that a crash is a record too.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Before any fixture: a record of a test that did not end."""
        self._write(item, DID_NOT_END)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """After each of set-up, call and tear-down; a failure in any of them is a failure of the case."""
        report = yield
        if report.failed:
            self._write(item, FAILS)
        elif report.skipped:
            self._write(item, SKIPPED)
        elif report.when == "call":
            noted: dict[str, Any] = {"outcome": WORKS}
            noted.update((name, value) for name, value in item.user_properties if name in NOTED)
            self._write(item, **noted)
        return report

    def _write(self, item: pytest.Item, outcome: str, **noted: Any) -> None:
        mark = item.get_closest_marker("scope")
        if mark is None:
            return
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        setting, row = (part.format(**parameters) for part in mark.args)
        found = {
            "setting": setting,
            "row": row,
            "outcome": outcome,
            "commit": commit(),
            "cpu": cpu_kind(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **noted,
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        # Several tests may be one case: each has a file of its own, so that none hides another's failure.
        name = f"{setting}-{row}-{hashlib.sha256(item.nodeid.encode()).hexdigest()[:8]}.json"
        (self._folder / name.replace("/", "_")).write_text(json.dumps(found) + "\n")
