# SPDX-License-Identifier: Apache-2.0
"""What the matrix found, for ``scripts/scope_table.py``: one JSON file a case in ``work/matrix/``."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "work" / "matrix"


def record(
    setting: str,
    row: str,
    outcome: str,
    acceptance_length: float | None = None,
    sentence: str | None = None,
) -> None:
    """Note that a case passed, and the sentence of a refusal."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    found: dict[str, str | float] = {"setting": setting, "row": row, "outcome": outcome}
    if sentence is not None:
        found["sentence"] = sentence
    if acceptance_length is not None:
        found["acceptance_length"] = round(acceptance_length, 2)
    (FOLDER / f"{setting}-{row}.json").write_text(json.dumps(found) + "\n")
