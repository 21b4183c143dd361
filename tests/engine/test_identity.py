# SPDX-License-Identifier: Apache-2.0
"""Greedy output identical to no speculation, on a random target with planted continuations among junk.

The reference is the same vLLM without speculation: same dtype, both eager or both compiled. In bf16 stock's own texts
may depend on the batch, on some CPUs; what parts is judged (`bench.identity`), never skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.doubles import planted
from tests.support.engines import (
    Asker,
    Texts,
    acceptance_length,
    assert_identical,
    counters_of,
    engine,
    generate,
    planted_options,
    random_prompts,
)

pytestmark = pytest.mark.engine

NUM_PROMPTS, NUM_TOKENS = 8, 160
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 64, "enable_prefix_caching": True}


def stock_texts(target: Path, **options: Any) -> Texts:
    """Stock's texts, all prompts at once."""
    with engine(target, **options) as llm:
        return generate(llm, random_prompts(NUM_PROMPTS), max_tokens=NUM_TOKENS)


def compare(
    llm: Any,
    reference: Texts,
    nodes: int,
    target: Path,
    options: dict[str, Any],
    *,
    group: int | None = None,
    cut: bool = False,
) -> float:
    """Generate with trees of ``nodes`` nodes, judge, and check that drafts were accepted."""
    planted.PlantedSource.limit = nodes
    before = counters_of(llm)
    texts = generate(llm, reference.prompts, group=group, max_tokens=NUM_TOKENS)
    counters = counters_of(llm) - before
    found = assert_identical(reference, texts, target, **options)
    length = acceptance_length(texts, counters)
    if nodes >= 4:
        # Planted drafts know nothing of a text behind the place where it parted.
        wanted = 2 if not found.findings else 1.2
        assert length >= wanted, (nodes, counters)
    if cut:
        assert counters.draft_tokens < counters.drafts * nodes, "the scheduler cut no tree"
    return length


@pytest.mark.parametrize(
    ("dtype", "eager"),
    [
        pytest.param("float32", True, id="float32-eager"),
        pytest.param("float32", False, id="float32-compiled"),
        pytest.param("bfloat16", True, id="bfloat16-eager"),
        pytest.param("bfloat16", False, id="bfloat16-compiled", marks=pytest.mark.matrix),
    ],
)
def test_core(dtype: str, eager: bool, random_target: Path, tmp_path: Path) -> None:
    """The part of the grid that every change must pass: budgets 4 and 16 in one engine."""
    options = {"dtype": dtype, "enforce_eager": eager, **CHUNKED}
    batched = stock_texts(random_target, **options)
    batched.plant(tmp_path / "answers.json")
    with engine(random_target, **options, **planted_options(16)) as llm:
        compare(llm, batched, 16, random_target, options, cut=True)
        compare(llm, batched, 4, random_target, options)


@pytest.mark.matrix
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
def test_grid(dtype: str, eager: bool, chunked: bool, random_target: Path, tmp_path: Path) -> None:
    """Budgets 1, 4, 8, 16, 32 in one engine, batched and one by one."""
    options = {"dtype": dtype, "enforce_eager": eager, **(CHUNKED if chunked else {})}
    batched = stock_texts(random_target, **options)
    batched.plant(tmp_path / "answers.json")
    with engine(random_target, **options, **planted_options(32)) as llm:
        for budget in (1, 4, 8, 16, 32):
            cut = chunked and budget >= 16
            compare(llm, batched, budget, random_target, options, cut=cut)
            compare(llm, batched, budget, random_target, options, group=1)


def test_any_number_of_nodes_fits_a_budget(random_target: Path, tmp_path: Path) -> None:
    """A source may return fewer nodes than the budget, none included."""
    batched = stock_texts(random_target, **CHUNKED)
    batched.plant(tmp_path / "answers.json")
    source = "tests.doubles.planted:FewerNodesSource"
    with engine(random_target, **CHUNKED, **planted_options(16, source)) as llm:
        texts = generate(llm, batched.prompts, max_tokens=NUM_TOKENS)
        counters = counters_of(llm)
    assert_identical(batched, texts, random_target, **CHUNKED)
    assert 0 < counters.draft_tokens < 16 * counters.drafts
    assert acceptance_length(texts, counters) >= 2


def test_stock_in_a_process_of_its_own_goes_on_with_a_text(random_target: Path) -> None:
    """What the judge does behind a rounding."""
    batched = stock_texts(random_target, **CHUNKED)
    prefixes = [
        [*prompt, *text[:40]] for prompt, text in zip(batched.prompts, batched.outputs, strict=True)
    ]
    with Asker(random_target, **CHUNKED) as again:
        rest = Texts(prefixes, again.ask(prefixes, [NUM_TOKENS - 40] * NUM_PROMPTS))
    expected = Texts(prefixes, [text[40:] for text in batched.outputs])
    assert_identical(expected, rest, random_target, **CHUNKED)
