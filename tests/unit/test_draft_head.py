# SPDX-License-Identifier: Apache-2.0
"""Rows of an LM head against the whole of it, by vLLM's own logits processor, and heads that are read as a whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import linear
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_hidden_transfer.drafting.vocabulary import DraftVocabulary
from vllm_hidden_transfer.engine.draft_head import HeadRows, WholeHeadError

VOCABULARY, SIZE, STEPS = 120, 16, 3
LISTED = np.arange(0, VOCABULARY, 3, dtype=np.int32)


def model(
    dtype: torch.dtype = torch.float32, head_dtype: torch.dtype | None = None, **processor: Any
) -> Any:
    """What a draft head looks at of vLLM's ``...ForCausalLM``."""
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        stock = LogitsProcessor(VOCABULARY, **processor)
    stock.head_dtype = head_dtype
    head = SimpleNamespace(
        weight=torch.randn(VOCABULARY + 8, SIZE).to(dtype),  # vLLM pads it
        quant_method=UnquantizedEmbeddingMethod(),
        tp_size=1,
        cpu_linear=linear,
    )
    return SimpleNamespace(
        lm_head=head,
        logits_processor=stock,
        compute_logits=lambda hidden: stock(head, hidden),
    )


def rows(target: Any) -> HeadRows:
    return HeadRows(target, torch.from_numpy(LISTED).long())


@pytest.mark.parametrize(
    "target",
    [
        model(),
        model(scale=0.25),
        model(soft_cap=3.0, scale=2.0),
        model(torch.bfloat16),
        model(torch.bfloat16, torch.float32),
    ],
    ids=["plain", "scaled", "capped", "bf16", "fp32 head"],
)
def test_logits_are_the_whole_heads(target: Any) -> None:
    texts = [np.array(text, dtype=np.int32) for text in ([1, 2, 3], [1], [6], [118, 119])]
    columns = torch.from_numpy(DraftVocabulary(LISTED, VOCABULARY).columns(texts))
    assert columns.shape == (4, len(LISTED) + 2)
    hidden = torch.randn(4, STEPS, SIZE).to(target.lm_head.weight.dtype)
    found = rows(target).logits(hidden, columns[:, len(LISTED) :])
    whole = target.compute_logits(hidden.flatten(0, 1)).unflatten(0, (4, STEPS))
    expected = whole.gather(2, columns.clamp(min=0)[:, None].expand(-1, STEPS, -1))
    expected = expected.masked_fill(columns[:, None] < 0, -torch.inf)
    assert found.dtype == whole.dtype
    torch.testing.assert_close(found, expected)
    assert found.isinf().sum() == STEPS * 3
    assert not target.logits_processor.logits_as_input


class LogitsProcessorWithLoRA(torch.nn.Module):
    """By the name of vLLM's own."""


def without_a_head(target: Any) -> None:
    target.lm_head = None


def quantised(target: Any) -> None:
    target.lm_head.quant_method = SimpleNamespace()


def over_ranks(target: Any) -> None:
    target.lm_head.tp_size = 2


def with_lora(target: Any) -> None:
    target.logits_processor = LogitsProcessorWithLoRA()


def with_a_formula_of_its_own(target: Any) -> None:
    stock = target.compute_logits
    target.compute_logits = lambda hidden: stock(hidden / 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_a_head, "no LM head of its own"),
        (quantised, "read by SimpleNamespace"),
        (over_ranks, "spread over ranks"),
        (with_lora, "come from LogitsProcessorWithLoRA"),
        (with_a_formula_of_its_own, "not plain products"),
    ],
)
def test_another_head_is_read_as_a_whole(change: Any, words: str) -> None:
    target = model()
    change(target)
    with pytest.raises(WholeHeadError, match=words):
        rows(target)
