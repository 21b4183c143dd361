# SPDX-License-Identifier: Apache-2.0
"""The short form of ``make soak``: a real server, many clients, disconnects, preemptions, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import soak

pytestmark = pytest.mark.engine


def test_two_minutes_of_load(tmp_path: Path) -> None:
    report = soak.run(minutes=2, clients=200, prompts=200, folder=tmp_path, seed=20261126)
    print(report)
    assert report["problems"] == []
    assert report["greedy_compared"] > 100
