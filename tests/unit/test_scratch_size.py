# SPDX-License-Identifier: Apache-2.0
"""How many blocks go to the scheduler and how many to tree paths, where vLLM sizes the cache itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_hidden_transfer.engine.attention.kv_store import blocks_beside_scratch, num_scratch_blocks


@given(st.integers(2, 100_000), st.integers(1, 512), st.integers(1, 64))
def test_cache_and_scratch_are_as_large_as_can_be(total: int, seqs: int, budget: int) -> None:
    blocks = blocks_beside_scratch(total, seqs, budget)
    assert blocks >= 1
    if blocks > 1:
        assert blocks + num_scratch_blocks(blocks, seqs, budget) <= total
    assert blocks + 1 + num_scratch_blocks(blocks + 1, seqs, budget) > total
