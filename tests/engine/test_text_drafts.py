# SPDX-License-Identifier: Apache-2.0
"""Drafts without a checkpoint in the engine: the texts are those of no speculation, and repetition is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_demo_target import chat_prompts
from tests.support.engines import (
    acceptance_length,
    assert_identical,
    counters_of,
    engine,
    generate,
    random_prompts,
)

pytestmark = pytest.mark.engine

WAYS = ["lookup", "recycling", "recycling and lookup"]


def without_maps(sources: list[str], **options: Any) -> dict[str, Any]:
    method = {"method": "hidden_transfer", "sources": sources, **options}
    return {"speculative_config": method}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.scope("without maps", "{way}")
def test_texts_are_those_of_no_speculation(way: str, random_target: Path) -> None:
    """Repetitive prompts in pieces, eight requests on a small token budget, greedy, seeded and with penalties."""
    whole: dict[str, Any] = {"enable_prefix_caching": True}
    # Stock dies of a seeded prompt in pieces (test_stock_bugs.py), so the reference gets them whole.
    options = {**whole, "max_num_batched_tokens": 96}
    prompts = [(prompt * 20)[:150] for prompt in random_prompts(10, longest=40)]
    sources = way.split(" and ")
    asked: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 3},
        # A text of four tokens repeats itself.
        {"allowed_token_ids": [5, 6, 7, 8]},
        {"allowed_token_ids": [5, 6, 7, 8], "temperature": 0.8, "seed": 3},
        {"allowed_token_ids": [5, 6, 7, 8], "repetition_penalty": 1.1, "presence_penalty": 0.2},
    ]
    with engine(random_target, **whole) as llm:
        references = [generate(llm, prompts, max_tokens=48, **each) for each in asked]
    with engine(random_target, **options, **without_maps(sources, always_draft=True)) as llm:
        texts = [generate(llm, prompts, max_tokens=48, **each) for each in asked]
        counters = counters_of(llm)
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        left = runner.model_runner.draft_source._drafts._proposed
    for reference, text in zip(references, texts, strict=True):
        assert_identical(reference, text, random_target, **whole)
    assert counters.drafts > 0
    if "lookup" in sources:  # what is recycled stands in for tokens that are not allowed here
        assert counters.accepted_tokens > 200
    assert len(left) <= 8  # the last batch's; the runner hears of their end at the next step


def test_it_pays_on_the_demo_target(demo_target: Path) -> None:
    """Editing prompts, as users without a checkpoint have it by default, and drafting always."""
    options: dict[str, Any] = {"dtype": "float32"}
    prompts = chat_prompts(demo_target, 9)
    with engine(demo_target, **options) as llm:
        reference = generate(llm, prompts, max_tokens=64, group=1)
    found = {}
    for always in (False, True):
        way = without_maps(["recycling", "lookup"], always_draft=always)
        with engine(demo_target, **options, **way) as llm:
            texts = generate(llm, prompts, max_tokens=64, group=1)
            found[always] = acceptance_length(texts, counters_of(llm))
        assert_identical(reference, texts, demo_target, **options)
    print(f"tokens a pass: {found[False]:.2f} by default, {found[True]:.2f} drafting always")
    assert found[True] > 1.5
