# SPDX-License-Identifier: Apache-2.0
"""Greedy output identical to no speculation, on a random target with planted continuations among junk.

The reference is the same vLLM without speculation: same dtype, both eager or both compiled. bf16 is asked batched
against batched, and one by one only where stock itself gives the same ids batched and one by one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import (
    Counters,
    Texts,
    acceptance_length,
    assert_identical,
    differences,
    engine,
    generate,
    planted_options,
    random_prompts,
)
from vllm_hidden_transfer.evaluation import planted

pytestmark = pytest.mark.engine

NUM_PROMPTS, NUM_TOKENS = 8, 160
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 64, "enable_prefix_caching": True}


def references(target: Path, batched_too: bool, **options: Any) -> tuple[Texts, Texts | None]:
    prompts = random_prompts(NUM_PROMPTS)
    with engine(target, **options) as llm:
        batched = generate(llm, prompts, max_tokens=NUM_TOKENS)
        alone = (
            generate(llm, prompts, batched=False, max_tokens=NUM_TOKENS) if batched_too else None
        )
    return batched, alone


def compare(
    llm: Any,
    reference: Texts,
    nodes: int,
    target: Path,
    *,
    batched: bool = True,
    cut: bool = False,
) -> float:
    """Generate with trees of ``nodes`` nodes, compare, and check that drafts were accepted."""
    planted.PlantedSource.limit = nodes
    before = Counters.of(llm)
    texts = generate(llm, reference.prompts, batched=batched, max_tokens=NUM_TOKENS)
    counters = Counters.of(llm).since(before)
    assert_identical(reference, texts, target, str(llm.model_config.dtype).split(".")[-1])
    length = acceptance_length(texts, counters)
    if nodes >= 4:
        assert length >= 2, (nodes, counters)
    if cut:
        assert counters.draft_tokens < counters.drafts * nodes, "the scheduler cut no tree"
    return length


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_core(dtype: str, eager: bool, random_target: Path, tmp_path: Path) -> None:
    """The part of the grid that every change must pass: budgets 4 and 16 in one engine."""
    options = {"dtype": dtype, "enforce_eager": eager, **CHUNKED}
    batched, _ = references(random_target, False, **options)
    batched.plant(tmp_path / "answers.json")
    with engine(random_target, **options, **planted_options(16)) as llm:
        compare(llm, batched, 16, random_target, cut=True)
        compare(llm, batched, 4, random_target)


@pytest.mark.matrix
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
def test_grid(
    dtype: str,
    eager: bool,
    chunked: bool,
    random_target: Path,
    tmp_path: Path,
    record_property: Any,
) -> None:
    """Budgets 1, 4, 8, 16, 32, batched and one by one."""
    options = {"dtype": dtype, "enforce_eager": eager, **(CHUNKED if chunked else {})}
    batched, alone = references(random_target, True, **options)
    assert alone is not None
    invariant = differences(batched, alone) == []
    record_property("stock_is_batch_invariant", invariant)
    if dtype == "float32":
        assert invariant
    batched.plant(tmp_path / "answers.json")
    for budget in (1, 4, 8, 16, 32):
        with engine(random_target, **options, **planted_options(budget)) as llm:
            compare(llm, batched, budget, random_target, cut=chunked and budget >= 16)
            if invariant:
                compare(llm, batched, budget, random_target, batched=False)


def test_any_number_of_nodes_fits_a_budget(random_target: Path, tmp_path: Path) -> None:
    """A source may return fewer nodes than the budget, none included."""
    batched, _ = references(random_target, False, **CHUNKED)
    batched.plant(tmp_path / "answers.json")
    source = "vllm_hidden_transfer.evaluation.planted:FewerNodesSource"
    with engine(random_target, **CHUNKED, **planted_options(16, source)) as llm:
        texts = generate(llm, batched.prompts, max_tokens=NUM_TOKENS)
        counters = Counters.of(llm)
    assert differences(batched, texts) == []
    assert 0 < counters.draft_tokens < 16 * counters.drafts
    assert acceptance_length(texts, counters) >= 2
