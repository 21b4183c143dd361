# SPDX-License-Identifier: Apache-2.0
"""Drafts from a part of the LM head: the same logits, texts without a change, and acceptance near the whole head's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.test_demo_target import chat_prompts, with_maps
from tests.support.checkpoints import random_checkpoint
from tests.support.engines import (
    assert_identical,
    counters_of,
    engine,
    generate,
    planted_options,
    random_prompts,
)
from tests.support.models import VOCABULARY
from vllm_hidden_transfer.checkpoint.vocabulary import save_vocabulary
from vllm_hidden_transfer.drafting.source import DraftBatch
from vllm_hidden_transfer.engine.cpu import TreeCPUModelRunner
from vllm_hidden_transfer.engine.draft_head import DraftHead
from vllm_hidden_transfer.engine.v1.transfer_source import TransferSource
from vllm_hidden_transfer.tree import TokenTree

pytestmark = pytest.mark.engine

CHECKPOINT_VARIABLE = "VLLM_HIDDEN_TRANSFER_TEST_CHECKPOINT"
LISTED = np.arange(0, VOCABULARY, 3, dtype=np.int32)


class ComparedSource(TransferSource):
    """Drafts from the list, and compares every logit with that of the whole head."""

    latest: ComparedSource
    own_tokens = 0
    worst = 0.0

    def __init__(self, runner: TreeCPUModelRunner) -> None:
        super().__init__(runner, os.environ[CHECKPOINT_VARIABLE])
        ComparedSource.latest = self

    def draft_logits(self, batch: DraftBatch, columns: torch.Tensor | None) -> torch.Tensor:
        whole = super().draft_logits(batch, None)
        logits = super().draft_logits(batch, columns)
        assert columns is not None
        for tokens, ids, found, expected in zip(
            batch.token_ids, columns, logits, whole, strict=True
        ):
            there = ids >= 0
            # Its own texts say what a request may draft, and no other's.
            assert {*ids[there].tolist()} == {*LISTED.tolist(), *tokens.tolist()}
            self.own_tokens += int(there.sum()) - len(LISTED)
            difference = found[:, there] - expected[:, ids[there]]
            self.worst = max(self.worst, float(difference.abs().max()))
            assert found[:, ~there].isneginf().all()
        return logits

    def propose(self, batch: DraftBatch) -> list[TokenTree]:
        trees = super().propose(batch)
        for tokens, tree in zip(batch.token_ids, trees, strict=True):
            assert len(tree) == batch.budget
            assert {*tree.tokens.tolist()} <= {*LISTED.tolist(), *tokens.tolist()}
        return trees


@pytest.mark.parametrize("bigram_rank", [0, 8])
def test_logits_are_the_whole_heads(
    bigram_rank: int, random_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = random_checkpoint(tmp_path / "maps", random_target, bigram_rank=bigram_rank)
    save_vocabulary(checkpoint, LISTED)
    monkeypatch.setenv(CHECKPOINT_VARIABLE, str(checkpoint))
    source = f"{ComparedSource.__module__}:{ComparedSource.__name__}"
    with engine(random_target, **planted_options(8, source)) as llm:
        generate(llm, random_prompts(5, longest=70), max_tokens=16)
    compared = ComparedSource.latest
    assert "683 tokens and each request's own" in compared.describe()
    assert compared.own_tokens > 1000
    assert compared.worst < 1e-4


def test_with_adapters_the_whole_head_is_read(random_target: Path, tmp_path: Path) -> None:
    """vLLM lets an adapter change the LM head, so its rows alone would not be the requests' logits."""
    checkpoint = random_checkpoint(tmp_path / "maps", random_target)
    save_vocabulary(checkpoint, LISTED)
    speculative = {"method": "hidden_transfer", "model": str(checkpoint), "always_draft": True}
    prompts = random_prompts(2)
    with engine(random_target, speculative_config=speculative, enable_lora=True) as llm:
        generate(llm, prompts, max_tokens=8)
        (said,) = llm.collective_rpc(lambda worker: worker.model_runner.draft_source.describe())
        assert counters_of(llm).drafts
    assert "all tokens instead of the checkpoint's list" in said
    assert "LogitsProcessorWithLoRA" in said


def test_the_committed_list_costs_little(
    demo_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 prompts x 48 tokens: the texts are stock's, and at most 15% of the acceptance length are lost."""
    options: dict[str, Any] = {"max_model_len": 1024}
    prompts = chat_prompts(demo_target, 4)
    with engine(demo_target, **options) as llm:
        reference = generate(llm, prompts, max_tokens=48)
    with engine(demo_target, **options, **with_maps(demo_target, 16)) as llm:
        texts = generate(llm, prompts, max_tokens=48)
        passes = counters_of(llm).drafts
        monkeypatch.setattr(DraftHead, "columns", lambda *_: None)
        generate(llm, prompts, max_tokens=48)
        with_the_whole_head = counters_of(llm).drafts - passes
    assert_identical(reference, texts, demo_target, **options)
    print(f"{passes} passes, {with_the_whole_head} with the whole head")
    assert with_the_whole_head < passes <= with_the_whole_head / 0.85
