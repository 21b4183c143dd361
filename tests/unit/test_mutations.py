# SPDX-License-Identifier: Apache-2.0
"""`make mutations` without engines: every error can be planted, and tests that fail without one are not believed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import typer

from tests import mutations
from tests.mutations import MUTATIONS, PACKAGE, ROOT, Mutation, Outcome


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_error_can_be_planted(mutation: Mutation, tmp_path: Path) -> None:
    path = tmp_path / PACKAGE / mutation.file
    path.parent.mkdir(parents=True)
    original = (ROOT / PACKAGE / mutation.file).read_text()
    path.write_text(original)
    mutations.plant(mutation, tmp_path)
    assert path.read_text() != original
    compile(path.read_text(), mutation.file, "exec")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_test_is_there(mutation: Mutation) -> None:
    file, _, name = mutation.test.partition("::")
    assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text()


def test_nothing_is_reported_when_the_control_is_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test of this error fails without it too: the name of no test would be reported as a catch."""
    broken = replace(MUTATIONS[0], test="tests/unit/test_tree.py::test_that_fails")

    def copy_with_a_failing_test(folder: Path) -> None:
        test = folder / "tests" / "unit" / "test_tree.py"
        test.parent.mkdir(parents=True)
        test.write_text("def test_that_fails() -> None:\n    raise AssertionError\n")

    def never(mutation: Mutation) -> Outcome:
        raise AssertionError("an error was planted")

    monkeypatch.setattr(mutations, "MUTATIONS", (broken,))
    monkeypatch.setattr(mutations, "copy_sources", copy_with_a_failing_test)
    monkeypatch.setattr(mutations, "catch", never)
    with pytest.raises(typer.Exit) as ended:
        mutations.main(None)
    assert ended.value.exit_code == 1
    printed = capsys.readouterr().out
    assert "1 failed" in printed
    assert "caught" not in printed


def test_an_unknown_error_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        mutations.main(["no such thing"])
    assert "no such error: no such thing" in capsys.readouterr().out
