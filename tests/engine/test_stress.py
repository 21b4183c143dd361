# SPDX-License-Identifier: Apache-2.0
"""No engine dies, starves, leaks or answers otherwise than without speculation, whatever its size and its requests.

Every number draws an engine (cache, block size, token budget, number of requests, prefill in pieces, preemption, nodes)
and what it is asked (``tests/support/stress.py``). Twenty are asked in ``make test``, two hundred in ``make matrix``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.doubles import planted
from tests.support import stress
from tests.support.checkpoints import random_checkpoint
from tests.support.engines import engine, planted_options
from tests.support.models import VOCABULARY
from vllm_hidden_transfer.tree import ROOT, TokenTree

pytestmark = pytest.mark.engine

FEW, MANY = 20, 200
AT_ONCE = 20
"""Whose reference answers one engine without speculation gives."""

Answers = list[list[list[int]]]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stress.stress_target(tmp_path_factory.mktemp("stress"))


@pytest.fixture(scope="module")
def checkpoint(target: Path) -> Path:
    return random_checkpoint(target.parent / "maps", target, layer=1, bigram_rank=4)


@cache
def references(target: Path, part: int) -> list[Answers]:
    """What the engine without speculation answers, one number at a time."""
    numbers = range(part * AT_ONCE, (part + 1) * AT_ONCE)
    # Every prompt in one piece: stock dies of a seeded one in chunks (test_stock_bugs.py).
    options = {
        "max_model_len": stress.LONGEST,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 1 << 14,
    }
    with engine(target, **options) as llm:
        return [stress.answer(llm, stress.draw(number).asks) for number in numbers]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=[] if number < FEW else pytest.mark.matrix)
        for number in range(MANY)
    ],
)
def test_random_engine(number: int, target: Path, checkpoint: Path, tmp_path: Path) -> None:
    expected = references(target, number // AT_ONCE)[number % AT_ONCE]
    drawn = stress.draw(number)
    print(drawn)
    speculation = planted_options(drawn.nodes)
    if drawn.real_drafts:
        config = {"method": "hidden_transfer", "model": str(checkpoint), "always_draft": True}
        if number % 2:  # the same without maps
            config = {"method": "hidden_transfer", "sources": ["lookup", "recycling"]}
        speculation = {"speculative_config": {**config, "num_speculative_tokens": drawn.nodes}}
    else:
        texts = [
            [*ask.prompt, *text]
            for ask, answers in zip(drawn.asks, expected, strict=True)
            for text in answers
        ]
        planted.write_answers(tmp_path / "answers.json", texts, VOCABULARY)
    options = {"max_model_len": stress.LONGEST, **drawn.options, **speculation}
    with engine(target, **options) as llm:
        assert stress.answer(llm, drawn.asks) == expected
        assert stress.left_behind(llm) == {}


class FanSource(planted.PlantedSource):
    """Junk that needs as many scratch blocks as can be: every node is a child of the root."""

    def tree(self, tokens: NDArray[np.int32], budget: int) -> TokenTree:
        junk = 3 + (int(tokens[-1]) + np.arange(budget)) % (VOCABULARY - 3)
        return TokenTree(junk, np.full(budget, ROOT))


def test_a_pass_beside_older_trees(target: Path, tmp_path: Path) -> None:
    """A token budget of four trees and five requests: the fifth keeps its tree until the four reach the end of a block,
    need twice the scratch, are cut, and leave rows for it. Nobody has counted that tree beside them."""
    rng = np.random.default_rng(0)
    asks = [stress.Ask(stress.prompt_of(rng, 12), 40) for _ in range(5)]
    with engine(target, max_model_len=stress.LONGEST) as llm:
        expected = stress.answer(llm, asks)
    planted.write_answers(tmp_path / "answers.json", [], VOCABULARY)
    options = {
        "max_model_len": stress.LONGEST,
        "max_num_batched_tokens": 68,
        "max_num_seqs": 5,
        "num_gpu_blocks_override": 40,
    }
    source = f"{FanSource.__module__}:{FanSource.__name__}"
    with engine(target, **options, **planted_options(16, source)) as llm:
        assert stress.answer(llm, asks) == expected
        assert stress.left_behind(llm) == {}
