# SPDX-License-Identifier: Apache-2.0
"""What the V1 runner keeps of one verification pass. No vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vllm_hidden_transfer.tree import TokenTree, VerificationWalk

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

IntArray = NDArray[np.int64]


@dataclass
class Step:
    """One verification pass: the trees of the batch's requests and where their rows are."""

    trees: list[TokenTree | None]
    """Of each request, as far as this pass can verify it; the rows of other nodes are computed and not looked at."""
    root_rows: IntArray
    """int64 [requests]: the row of each request's root; the rows of its nodes follow."""
    root_positions: IntArray
    """int64 [requests]: its position."""
    decoding: bool = True
    """Whether no prompt is in this pass."""
    started: float = 0.0
    """``time.perf_counter()`` when it began."""
    walk: VerificationWalk | None = None
    attention: CommonAttentionMetadata | None = None
    """vLLM's own metadata of this pass."""

    @classmethod
    def empty(cls) -> Step:
        nothing = np.zeros(0, dtype=np.int64)
        return cls([], nothing, nothing)

    @property
    def has_trees(self) -> bool:
        return any(tree is not None for tree in self.trees)

    def last_rows(self) -> IntArray:
        """int64 [requests]: the row of the last accepted token, whose logits gave the token just sampled."""
        if self.walk is None:
            return self.root_rows
        return self.root_rows + np.array(self.walk.nodes) + 1
