# SPDX-License-Identifier: Apache-2.0
"""Greedy identity on the demo target with its trained maps, on chat prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import (
    acceptance_length,
    assert_identical,
    counters_of,
    engine,
    generate,
    planted_options,
)
from vllm_hidden_transfer.drafting.source import DraftBatch
from vllm_hidden_transfer.engine.cpu import TreeCPUModelRunner
from vllm_hidden_transfer.engine.v1.transfer_source import TransferSource
from vllm_hidden_transfer.tree import TokenTree

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = EXAMPLES / "prompts" / "unseen.jsonl"
TARGET = EXAMPLES / "smollm2-135m"
CHUNKED: dict[str, Any] = {
    "max_num_batched_tokens": 64,
    "enable_prefix_caching": True,
    "max_model_len": 1024,
}


def chat_prompts(target: Path, count: int) -> list[list[int]]:
    """Token ids of chat prompts of all kinds."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    lines = PROMPTS.read_text().splitlines()
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["prompt"]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        for line in lines[:: len(lines) // count][:count]
    ]


class LimitedSource(TransferSource):
    """The committed maps with any budget below the engine's: an engine of its own for each takes too long."""

    limit = 16

    def __init__(self, runner: TreeCPUModelRunner) -> None:
        super().__init__(runner, str(TARGET / "hidden_transfer"))

    def propose(self, batch: DraftBatch) -> list[TokenTree]:
        return super().propose(replace(batch, budget=min(batch.budget, self.limit)))


def with_maps(target: Path, budget: int) -> dict[str, Any]:
    return {
        "speculative_config": {
            "method": "hidden_transfer",
            "model": str(target / "hidden_transfer"),
            "num_speculative_tokens": budget,
            "always_draft": True,
        }
    }


@pytest.mark.parametrize(("dtype", "count", "tokens"), [("float32", 4, 48), ("bfloat16", 2, 16)])
def test_core(dtype: str, count: int, tokens: int, demo_target: Path) -> None:
    """Both dtypes on every CPU, with the checkpoint's 16 nodes; fewer tokens in bf16, which many CPUs emulate."""
    options = {"dtype": dtype, **CHUNKED}
    prompts = chat_prompts(demo_target, count)
    with engine(demo_target, **options) as llm:
        reference = generate(llm, prompts, max_tokens=tokens)
    with engine(demo_target, **options, **with_maps(demo_target, 16)) as llm:
        texts = generate(llm, prompts, max_tokens=tokens)
        counters = counters_of(llm)
    assert_identical(reference, texts, demo_target, **options)
    assert acceptance_length(texts, counters) >= (1.8 if dtype == "float32" else 1.3)


@pytest.mark.matrix
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grid(dtype: str, eager: bool, demo_target: Path) -> None:
    """8 prompts x 64 tokens, budgets 1 to 32 in one engine, batched and one by one, against stock batched."""
    options = {"dtype": dtype, "enforce_eager": eager, **CHUNKED}
    prompts = chat_prompts(demo_target, 8)
    with engine(demo_target, **options) as llm:
        reference = generate(llm, prompts, max_tokens=64)
    source = f"{LimitedSource.__module__}:{LimitedSource.__name__}"
    with engine(demo_target, **options, **planted_options(32, source)) as llm:
        for budget in (1, 4, 8, 16, 32):
            LimitedSource.limit = budget
            for group in (None, 1):
                before = counters_of(llm)
                texts = generate(llm, prompts, max_tokens=64, group=group)
                counters = counters_of(llm) - before
                assert_identical(reference, texts, demo_target, **options)
                if budget >= 8:
                    assert acceptance_length(texts, counters) >= 1.8
