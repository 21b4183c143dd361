# SPDX-License-Identifier: Apache-2.0
"""The scope table is what the feature matrix recorded, no more: outcomes, commits, failures."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import tests
from tests.matrix.record import DID_NOT_END, FAILS, SKIPPED, WORKS, Recorder, commit
from tests.matrix.rows import ROWS
from tests.matrix.settings import SETTINGS
from tests.matrix.table import BEGIN, END, PAGE, RESULTS, collect, render, with_table

pytest_plugins = ["pytester"]

TESTS = """
import os
import pytest

@pytest.fixture
def broken():
    raise OSError("no engine")

@pytest.fixture
def breaks_late():
    yield
    raise OSError("a leak")

@pytest.mark.scope("default", "{row}")
@pytest.mark.parametrize("row", ["greedy", "top_k"])
def test_rows(row, record_property):
    record_property("acceptance_length", 4.5)
    assert row == "greedy"

@pytest.mark.scope("default", "refused")
def test_noted(record_property):
    record_property("outcome", "refused")
    record_property("sentence", "no.")

@pytest.mark.scope("default", "no set-up")
def test_set_up(broken): ...

@pytest.mark.scope("default", "no end")
def test_tear_down(breaks_late): ...

@pytest.mark.scope("default", "skip")
def test_skip():
    pytest.skip("not here")

@pytest.mark.scope("default", "two")
@pytest.mark.parametrize("part", ["first", "second"])
def test_two_are_one_case(part):
    assert part == "second"

def test_no_case(): ...
"""


def case(row: str = "greedy", **more: Any) -> dict[str, dict[str, Any]]:
    """One recorded case of the default setting."""
    return {f"default-{row}": {"setting": "default", "row": row, "outcome": WORKS, **more}}


def line_of(table: str, title: str) -> str:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {title} |")]
    return line


def test_the_page_has_the_table_of_the_results() -> None:
    page = PAGE.read_text()
    assert page == with_table(page, render(json.loads(RESULTS.read_text())))


def test_what_was_not_recorded_is_not_claimed() -> None:
    table = render({})
    assert "| works |" not in table
    assert table.count("not run") > len(ROWS) + len(SETTINGS)


def test_the_rest_of_a_page_stays() -> None:
    assert with_table(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"


def test_every_outcome_is_recorded(pytester: pytest.Pytester, tmp_path: Path) -> None:
    pytester.makepyfile(TESTS)
    pytester.inline_run("-p", "no:cacheprovider", plugins=[Recorder(tmp_path)])
    found = collect(tmp_path)
    assert {case["row"]: case["outcome"] for case in found.values()} == {
        "greedy": WORKS,
        "top_k": FAILS,
        "refused": "refused",
        "no set-up": FAILS,
        "no end": FAILS,
        "skip": SKIPPED,
        "two": FAILS,
    }
    for one in found.values():
        assert one["commit"] == commit()
        assert one["cpu"]
        assert one["date"].startswith("20")
    assert found["default-greedy"]["acceptance_length"] == 4.5
    assert found["default-refused"]["sentence"] == "no."
    table = render(found)
    assert "| works | 4.5 | 1 |" in line_of(table, "greedy")
    assert "| **fails** |  | 1 |" in line_of(table, "top-k")


def test_a_test_that_took_python_down_did_not_end(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(tests.__file__).parent.parent))
    pytester.makepyfile(
        "import os, pytest\n"
        "@pytest.mark.scope('default', 'greedy')\n"
        "def test_crash():\n"
        "    os._exit(3)\n"
    )
    pytester.makeconftest(
        "from pathlib import Path\n"
        "from tests.matrix.record import Recorder\n"
        f"def pytest_configure(config): config.pluginmanager.register(Recorder(Path({str(tmp_path)!r})))\n"
    )
    assert pytester.runpytest_subprocess().ret == 3
    (found,) = collect(tmp_path).values()
    assert found["outcome"] == DID_NOT_END
    assert "| **did not end** |" in line_of(render({"default-greedy": found}), "greedy")


def test_one_failed_case_of_a_setting_is_the_settings() -> None:
    setting = next(setting for setting in SETTINGS if len(setting.rows) == 2)
    found = {
        f"{setting.name}-{row}": {"setting": setting.name, "row": row, "outcome": outcome}
        for row, outcome in zip(setting.rows, (WORKS, FAILS), strict=True)
    }
    assert "| **fails** |" in line_of(render(found), setting.title)
    del found[f"{setting.name}-{setting.rows[1]}"]
    assert "| not run |" in line_of(render(found), setting.title)


def test_rows_of_another_commit_are_shown_as_such() -> None:
    new = {"commit": "bbbbbbb", "cpu": "A", "date": "2026-11-26T08:00:00+00:00"}
    table = render(
        {
            **case("top_k", commit="aaaaaaa", cpu="A", date="2026-11-25T08:00:00+00:00"),
            **case("greedy", **new),
            **case("min_p"),
        }
    )
    assert "1. commit bbbbbbb, A, 2026-11-26\n" in table
    assert "2. commit aaaaaaa, A, 2026-11-25\n" in table
    assert "3. commit not recorded, not recorded, day not recorded\n" in table
    assert "| works |  | 1 |" in line_of(table, "greedy")
    assert "| works |  | 2 |" in line_of(table, "top-k")
    assert "| works |  | 3 |" in line_of(table, "min_p")


def test_the_commit_says_whether_the_tree_is_its_own(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    ask = commit.__wrapped__
    assert ask(tmp_path) == "unknown"
    git("init")
    git("commit", "--allow-empty", "-m", "one")
    assert len(ask(tmp_path)) == 7
    (tmp_path / "new.py").write_text("")
    assert ask(tmp_path).endswith("+changes")
