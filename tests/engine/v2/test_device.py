# SPDX-License-Identifier: Apache-2.0
"""The GPU adapter on CPU tensors under Triton's interpreter: the texts are those of no speculation.

The functions named ``compare_...`` run in a process of their own (``under_v2``) on the bed of ``device_bed``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.engine.v2 import VOCABULARY
from tests.engine.v2.test_identity import BOTH_SCHEDULERS, CHUNKED, Found, sampled
from tests.support.checkpoints import random_checkpoint
from tests.support.engines import Texts, engine, generate, planted_options, random_prompts
from tests.support.under_v2 import under_v2

pytestmark = pytest.mark.engine


def compare_planted(target: Path, answers: Path, asynchronous: bool, nodes: int) -> list[Found]:
    """Prompts in chunks beside trees, a prefix cache, more prompts than slots; then seeds."""
    from tests.support import device_bed

    options = {"async_scheduling": asynchronous, **CHUNKED}
    prompts = random_prompts(6, vocabulary=VOCABULARY, longest=60)
    with engine(target, **options) as llm:
        greedy = generate(llm, prompts, max_tokens=24)
        cool, _ = sampled(llm, prompts[:2], "cool", False)
    both = [*greedy.prompts, *cool.prompts], [*greedy.outputs, *cool.outputs]
    Texts(*both).plant(answers, VOCABULARY)
    device_bed.use()
    with engine(target, **options, **planted_options(nodes)) as llm:
        device_bed.runner_of(llm)
        return [
            Found.between(llm, greedy, lambda: generate(llm, prompts, max_tokens=24)),
            Found.between(llm, cool, lambda: sampled(llm, prompts[:2], "cool", False)[0]),
        ]


@pytest.mark.parametrize("nodes", [7, 15])
@BOTH_SCHEDULERS
@pytest.mark.scope("gpu", "planted-{scheduler}-{nodes}")
def test_planted_trees(
    scheduler: str, nodes: int, tiny_target: Path, tmp_path: Path, record_property: Any
) -> None:
    asynchronous = scheduler == "async"
    greedy, cool = under_v2(
        compare_planted,
        *(tiny_target, tmp_path / "answers.json", asynchronous, nodes),
        async_scheduling=asynchronous,
    )
    greedy.judge(tiny_target, "float32")
    assert cool.different == []
    assert min(greedy.acceptance_length, cool.acceptance_length) >= 1.8
    record_property("acceptance_length", round(greedy.acceptance_length, 2))
