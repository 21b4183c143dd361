# SPDX-License-Identifier: Apache-2.0
"""The committed maps are worth what is recorded of them: trees of 16 nodes on recorded answers, offline in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.acceptance_baseline import CHECKPOINTS, Worth, expected, judge_all


@pytest.fixture(scope="module")
def found(demo_target: Path) -> dict[str, Worth]:
    return judge_all()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_maps_are_worth_what_is_recorded(checkpoint: str, found: dict[str, Worth]) -> None:
    assert found[checkpoint].misses(expected()[checkpoint]) == []


def test_what_lies_further_off_is_a_miss() -> None:
    recorded = Worth(passes=1000, length=3.0, reached=(0.9, 0.5, 0.01))
    near = Worth(passes=1010, length=2.95, reached=(0.9, 0.5, 0.0112))
    assert near.misses(recorded) == []
    worse = Worth(passes=1060, length=2.9, reached=(0.9, 0.48, 0.01))
    assert len(worse.misses(recorded)) == 2
    assert len(recorded.misses(worse)) == 2
