# SPDX-License-Identifier: Apache-2.0
"""A thinking budget stays with its request when requests of a batch change places."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from vllm_hidden_transfer.patches.thinking_budgets import mended_holder

START, END = 5, 6
CONFIG: Any = SimpleNamespace(reasoning_start_token_ids=[START], reasoning_end_token_ids=[END])
CPU = torch.device("cpu")


def stock_holder() -> ThinkingBudgetStateHolder:
    return ThinkingBudgetStateHolder(CONFIG, 8, 0, CPU, False)


def after(holder: Any, *moves: tuple[int, int, MoveDirectionality]) -> dict[int, int]:
    """Place -> budget once requests in places 1 and 3 of four have budgets, and these moves were made."""
    budgets = {1: 10, 3: 30}
    added: list[Any] = [
        (place, SamplingParams(thinking_token_budget=budgets.get(place)), [START], [])
        for place in range(4)
    ]
    holder.sync_batch(BatchUpdate(4, removed=[], added=added, moved=[]))
    holder.sync_batch(BatchUpdate(4, removed=[], added=[], moved=list(moves)))
    return {place: state["thinking_token_budget"] for place, state in holder._state.items()}


MOVE, SWAP = MoveDirectionality.UNIDIRECTIONAL, MoveDirectionality.SWAP


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ([(3, 1, MOVE)], {1: 30}),
        ([(2, 1, MOVE)], {3: 30}),
        ([(2, 1, MOVE), (3, 2, MOVE)], {2: 30}),
        ([(1, 3, SWAP)], {1: 30, 3: 10}),
        ([(1, 2, SWAP)], {2: 10, 3: 30}),
        ([(0, 3, SWAP), (2, 0, MOVE)], {1: 10}),
    ],
)
def test_moves(moves: list[tuple[int, int, MoveDirectionality]], expected: dict[int, int]) -> None:
    assert after(mended_holder(CONFIG, 8, CPU), *moves) == expected


def test_stock_leaves_a_budget_to_the_next_request() -> None:
    """When this fails, upstream has mended it: remove patches/thinking_budgets.py but for its place of no drafts."""
    assert after(stock_holder(), (2, 1, MOVE)) == {1: 10, 3: 30}
    assert after(stock_holder(), (3, 1, MOVE)) == {1: 30}  # the rest is right


def test_forced_tokens_are_in_the_request_s_own_row() -> None:
    """Two budgets of nothing, in places 1 and 3: both must end now, and the others are left alone."""
    holder = mended_holder(CONFIG, 8, CPU)
    added: list[Any] = [
        (place, SamplingParams(thinking_token_budget=0 if place % 2 else None), [START], [])
        for place in range(4)
    ]
    holder.sync_batch(BatchUpdate(4, removed=[], added=added, moved=[]))
    holder.update_state([[]] * 4, [[]] * 4)
    logits = holder.apply_to_logits(torch.zeros(4, 8), False, [[]] * 4)
    assert logits.argmax(-1).tolist() == [0, END, 0, END]
