# SPDX-License-Identifier: Apache-2.0
"""The trees that await verification, by V2's request slots, beside its own ``req_states.draft_tokens``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_hidden_transfer.tree import TreeTensors, tensors

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch


class TreeSlots:
    """One tree of K nodes for every request slot; a slot without drafts holds a chain of dead nodes."""

    def __init__(self, num_slots: int, num_nodes: int, device: torch.device) -> None:
        self.num_nodes = num_nodes
        rows = torch.arange(num_nodes + 1, device=device)
        self._chain_parents, self._chain_depths = rows[:-1] - 1, rows
        self.parents = self._chain_parents.repeat(num_slots, 1)
        """int64 [slots, K]."""
        self.alive = torch.zeros(num_slots, num_nodes, dtype=torch.bool, device=device)
        """bool [slots, K]."""
        self.depths = self._chain_depths.repeat(num_slots, 1)
        """int64 [slots, K + 1], of the root's row and of each node's."""

    def reset(self, slot: int) -> None:
        """A slot has a new owner, who must not meet the last one's tree."""
        self.parents[slot].copy_(self._chain_parents)
        self.alive[slot].zero_()
        self.depths[slot].copy_(self._chain_depths)

    def put(self, slots: torch.Tensor, trees: TreeTensors) -> None:
        """Keep the trees of some requests until they are verified; ``slots`` is int64 [b]."""
        self.parents.index_copy_(0, slots, trees.parents)
        self.alive.index_copy_(0, slots, trees.alive)
        self.depths.index_copy_(0, slots, tensors.depths(trees.parents))

    def shift(self, batch: InputBatch) -> torch.Tensor:
        """int64 [rows with logits]: depth minus place in the request's rows, which makes positions of linear ones."""
        rows = batch.expanded_local_pos.long()
        return self.depths[batch.expanded_idx_mapping, rows] - rows
