# SPDX-License-Identifier: Apache-2.0
"""Texts under vLLM's own setting of VLLM_CPU_ATTN_SPLIT_KV, 1, with two threads, as `vllm serve` runs.

Attention then adds the keys of a long context in pieces, one a thread, whose borders depend on the other requests of
the step. The other tests set 0.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import (
    SMALL,
    Texts,
    assert_identical,
    planted_options,
    random_prompts,
)
from vllm_hidden_transfer.bench.engine_process import (
    EngineProcess,
    Generation,
    SpecCounters,
    acceptance_length,
    spec_counters,
)

pytestmark = pytest.mark.engine

AS_SERVED = {"OMP_NUM_THREADS": "2", "VLLM_CPU_ATTN_SPLIT_KV": "1"}
PROMPTS = random_prompts(4, lengths=[400, 30, 250, 120])
GREEDY = {"temperature": 0.0, "max_tokens": 48, "ignore_eos": True, "detokenize": False}


def answer(
    target: Path, log: Path, options: dict[str, Any]
) -> tuple[list[Generation], SpecCounters]:
    with EngineProcess(log.stem, {"model": str(target), **SMALL, **options}, log, AS_SERVED) as one:
        return one.generate(PROMPTS, GREEDY), spec_counters(one.metrics())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_text_is_wrong(dtype: str, random_target: Path, tmp_path: Path) -> None:
    options = {"dtype": dtype, "max_num_batched_tokens": 128}
    stock, _ = answer(random_target, tmp_path / "stock.log", options)
    reference = Texts(PROMPTS, [one.token_ids for one in stock])
    reference.plant(tmp_path / "answers.json")
    planted = {**options, **planted_options(16)}
    ours, counters = answer(random_target, tmp_path / "ours.log", planted)
    texts = Texts(PROMPTS, [one.token_ids for one in ours])
    found = assert_identical(reference, texts, random_target, AS_SERVED, **options)
    # Planted drafts know nothing of a text behind the place where it parted.
    assert acceptance_length(ours) >= (2 if not found.findings else 1.2)
    assert counters.drafts > 0


SPLIT = """
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

current_platform.import_kernels()
torch.set_num_threads(2)
print([
    ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        seq_lens=torch.tensor([400], dtype=torch.int32),
        dtype=torch.float32,
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
        causal=True,
        sliding_window_size=-1,
        isa="vec",
        enable_kv_split=split,
    ).numel()
    for split in (False, True)
])
"""


def test_stock_splits_these_contexts() -> None:
    """Where the setting changes nothing, the test above shows nothing: it must make more pieces of work.

    In a process of its own, because vLLM keeps the number of threads once an engine has been there.
    """
    done = subprocess.run(
        [sys.executable, "-c", SPLIT],
        capture_output=True,
        text=True,
        env={**os.environ, **AS_SERVED},
        check=True,
    )
    whole, split = ast.literal_eval(done.stdout.splitlines()[-1])
    assert whole < split
