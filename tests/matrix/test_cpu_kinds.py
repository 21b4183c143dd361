# SPDX-License-Identifier: Apache-2.0
"""Greedy identity under kernels of other CPUs, as far as one machine can be made to use them.

The kind is chosen when libraries are loaded, so every one gets a pytest of its own over the rows of identity. vLLM's
attention has a choice of its own besides: ``vec16`` for head sizes such as 80.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doubles import planted
from tests.engine.test_identity import CHUNKED
from tests.support.engines import (
    acceptance_length,
    assert_identical,
    counters_of,
    engine,
    generate,
    planted_options,
    random_prompts,
)
from tests.support.models import random_model
from vllm_hidden_transfer.machine import this_machine

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

ROOT = Path(__file__).parents[2]
ROWS = [
    "tests/engine/test_identity.py::test_core[float32-eager]",
    "tests/engine/test_identity.py::test_core[bfloat16-eager]",
    "tests/engine/test_demo_target.py::test_core[float32-4-48]",
]
KINDS = {
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "onednn-sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "onednn-avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "vllm-without-amx": {"LESSER_CPU": "amx"},
    "vllm-avx2": {
        "LESSER_CPU": "avx512",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
NEEDED = {
    "aten-avx2": "avx2",
    "onednn-avx512": "avx512f",
    "vllm-without-amx": "amx_bf16",
    "vllm-avx2": "avx512f",
}
"""What a CPU must have so that the kind is another than its own, or can run."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_identity(kind: str) -> None:
    flag = NEEDED.get(kind)
    if flag is not None and flag not in this_machine().flags:
        pytest.skip(f"this CPU has no {flag}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.support.lesser_cpu", *ROWS]
    found = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, **KINDS[kind]},
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:]
    assert f"{len(ROWS)} passed" in found.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_for_odd_head_sizes(dtype: str, tmp_path: Path) -> None:
    """Head size 80, for which vLLM takes ``vec16`` on every CPU."""
    import torch
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    assert _get_attn_isa(getattr(torch, dtype), 32, 80) == "vec16"
    target = random_model(tmp_path / "target", layers=4, head_dim=80)
    options = {"dtype": dtype, **CHUNKED}
    prompts = random_prompts(4)
    with engine(target, **options) as llm:
        reference = generate(llm, prompts, max_tokens=64)
    reference.plant(tmp_path / "answers.json")
    planted.PlantedSource.limit = None
    with engine(target, **options, **planted_options(16)) as llm:
        texts = generate(llm, prompts, max_tokens=64)
        length = acceptance_length(texts, counters_of(llm))
    found = assert_identical(reference, texts, target, **options)
    assert length >= (2 if not found.findings else 1.2)
