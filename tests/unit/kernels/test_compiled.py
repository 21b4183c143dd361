# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for GPUs that are not there, into tensor cores' instructions and with few spilled registers.

A process of its own compiles them: the interpreter, under which the other tests run, leaves nothing to compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.aot import SHARED_LIMITS, TARGETS, Report

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SPILLED = {"sm_80": 64, "sm_89": 80, "sm_90": 32, "sm_100": 32, "sm_120": 160, "gfx942": 64}
"""Bytes of stack and instructions that spill at most; with Triton 3.9 they are 32, 40, 0, 0, 88 and 36 at most."""
SPILLED_FP32 = 640
"""Products without tensor cores keep all in registers: 456 with Triton 3.9."""


def compiled(*names: str) -> list[Report]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.aot", *names],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [Report(**json.loads(line)) for line in done.stdout.splitlines()]


def judge(reports: list[Report]) -> None:
    for one in reports:
        is_fp32 = one.case == "fp32"
        assert max(one.stack, one.spills) <= (SPILLED_FP32 if is_fp32 else SPILLED[one.arch]), one
        assert one.shared <= SHARED_LIMITS[one.arch], one
        has_products = one.kernel in ("tree_attention_kernel", "exact_rows_kernel")
        if has_products and not is_fp32:
            assert one.products > 0, one
            assert one.async_copies > 0 or one.arch == "gfx942", one


def test_every_target() -> None:
    """Attention for all targets, everything else for one."""
    reports = compiled("quick")
    assert {one.arch for one in reports} == {*TARGETS}
    assert len({one.kernel for one in reports}) == 5
    judge(reports)


@pytest.mark.matrix
@pytest.mark.parametrize("arch", TARGETS)
def test_every_case(arch: str) -> None:
    reports = compiled(arch)
    assert len(reports) >= 11
    judge(reports)
