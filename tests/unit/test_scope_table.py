# SPDX-License-Identifier: Apache-2.0
"""The README's scope table is what the feature matrix recorded, no more."""

from __future__ import annotations

import json

from tests.matrix.rows import ROWS
from tests.matrix.settings import SETTINGS
from tests.matrix.table import BEGIN, END, README, RESULTS, render, with_table


def test_the_readme_has_the_table_of_the_results() -> None:
    readme = README.read_text()
    assert readme == with_table(readme, render(json.loads(RESULTS.read_text())))


def test_what_was_not_recorded_is_not_claimed() -> None:
    table = render({"machine": "some CPU", "cases": {}})
    assert "| works |" not in table
    assert table.count("not run") > len(ROWS) + len(SETTINGS)


def test_the_rest_of_a_readme_stays() -> None:
    assert with_table(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
