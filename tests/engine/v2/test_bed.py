# SPDX-License-Identifier: Apache-2.0
"""The test bed itself: stock V2 under Triton's interpreter answers as stock V1 does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.v2 import VOCABULARY
from tests.support.engines import Texts, engine, generate, random_prompts
from tests.support.under_v2 import under_v2

pytestmark = pytest.mark.engine


def greedy(target: Path, options: dict[str, Any]) -> tuple[Texts, str]:
    """Greedy texts of an engine without speculation, and the module of its model runner."""
    prompts = random_prompts(3, vocabulary=VOCABULARY, longest=40)
    with engine(target, **options) as llm:
        texts = generate(llm, prompts, max_tokens=12)
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        return texts, type(worker.model_runner).__module__


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_stock_v2_equals_stock_v1(asynchronous: bool, tiny_target: Path) -> None:
    texts, runner = greedy(tiny_target, {})
    assert "gpu" not in runner
    options = {"max_num_batched_tokens": 32, "async_scheduling": asynchronous}
    under, runner = under_v2(greedy, tiny_target, options, async_scheduling=asynchronous)
    assert runner == "vllm.v1.worker.cpu.model_runner"
    assert under.outputs == texts.outputs
