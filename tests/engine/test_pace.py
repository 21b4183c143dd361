# SPDX-License-Identifier: Apache-2.0
"""The budget in the engine: whatever it decides, the texts are those of no speculation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.test_demo_target import chat_prompts
from tests.support.engines import (
    acceptance_length,
    assert_identical,
    counters_of,
    engine,
    generate,
    planted_options,
    random_prompts,
)
from vllm_hidden_transfer.drafting.budget import Budget, Choice
from vllm_hidden_transfer.engine.v1.pace import Pace

pytestmark = pytest.mark.engine


class Fickle(Budget):
    """Drafts for random requests and keeps random probable nodes of their trees."""

    rng = np.random.default_rng(5)
    chosen, asked = 0, 0

    def choose(self, request_ids: Sequence[str], lengths: Any, looked_up: Any = ()) -> Choice:
        super().choose(request_ids, lengths, looked_up)
        places = np.flatnonzero(self.rng.random(len(request_ids)) < 0.5)
        Fickle.chosen += len(places)
        Fickle.asked += len(request_ids)
        return Choice(tuple(places.tolist()), 1.0)

    def cut(self, choice: Choice, requests: int, reads: int, trees: Any) -> list[Any]:
        super().cut(choice, requests, reads, trees)
        return [each >= self.rng.choice([0.0, 0.1, 0.3, 2.0]) for _, each in trees]


def test_a_fickle_budget_changes_no_text(
    random_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests with and without drafts in one pass, trees of any size, greedy and seeded."""
    options: dict[str, Any] = {
        "max_num_batched_tokens": 96,
        "max_num_seqs": 4,
        "enable_prefix_caching": True,
    }
    prompts = random_prompts(8, longest=120)
    with engine(random_target, **options) as llm:
        reference = generate(llm, prompts, max_tokens=48)
        sampled = generate(llm, prompts[:4], max_tokens=48, temperature=0.8, seed=3)
    reference.plant(tmp_path / "answers.json")
    monkeypatch.setattr("vllm_hidden_transfer.engine.v1.pace.Budget", Fickle)
    way = planted_options(12)
    way["speculative_config"]["always_draft"] = False
    with engine(random_target, **options, **way) as llm:
        texts = generate(llm, prompts, max_tokens=48)
        counters = counters_of(llm)
        sampled_texts = generate(llm, prompts[:4], max_tokens=48, temperature=0.8, seed=3)
    assert_identical(reference, texts, random_target, **options)
    assert sampled_texts.outputs == sampled.outputs
    assert 0.3 < Fickle.chosen / Fickle.asked < 0.7
    assert acceptance_length(texts, counters) > 1.3


def test_the_default_budget_on_the_demo_target(demo_target: Path) -> None:
    """As users have it: exact, and it learns what passes cost. Whether it drafts is this machine's affair."""
    options: dict[str, Any] = {"dtype": "float32"}
    prompts = chat_prompts(demo_target, 3)
    with engine(demo_target, **options) as llm:
        reference = generate(llm, prompts, max_tokens=48, group=1)
    maps = {"speculative_config": {"method": "hidden_transfer"}}
    with engine(demo_target, **options, **maps) as llm:
        texts = generate(llm, prompts, max_tokens=48, group=1)
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        pace = worker.model_runner.pace
    assert isinstance(pace, Pace)
    budget = pace.budget
    assert_identical(reference, texts, demo_target, **options)
    assert budget.plain.seen(1) >= 3
    assert budget.maps.costs.known
    # The last request is gone for the runner when the next step begins.
    assert len(budget.maps._of_each) <= 1
    assert len(budget.text._of_each) <= 1
    one, many = float(budget.plain.predict(1, 100)), float(budget.steps.predict(17, 100))
    print(f"a step of 1 row {one * 1e3:.0f} ms, of 17 {many * 1e3:.0f} ms")
    assert min(one, many) > 0
