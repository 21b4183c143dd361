# SPDX-License-Identifier: Apache-2.0
"""Trees of a batch as tensors on the device: ancestors, depths, walk. Nothing here waits for the device but ``of`` and
``on_host``.

The tensor twins of ``token_tree`` and ``walk``, for a runner that never knows on the host what was drafted
or accepted. Every request has the same number of rows: a tree with fewer nodes is padded with dead ones, which hang
off the row before them (so that rows stay in topological order) and can never be accepted. Plain torch, no vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_hidden_transfer.tree.token_tree import ROOT, TokenTree


@dataclass(frozen=True)
class TreeTensors:
    """One tree of K nodes for each of b requests, every parent before its children."""

    tokens: torch.Tensor
    """int64 [b, K]: draft tokens; 0 at dead nodes."""
    parents: torch.Tensor
    """int64 [b, K]: each node's parent, ``ROOT`` for a child of the root."""
    alive: torch.Tensor
    """bool [b, K]: False at dead nodes."""
    log_probabilities: torch.Tensor | None = None
    """float64 [b, K]: of each node's path under the drafts, where known; -inf at dead nodes."""

    @classmethod
    def of(cls, trees: Sequence[TokenTree], budget: int, device: torch.device) -> TreeTensors:
        """Host trees of at most ``budget`` nodes, padded to it."""
        tokens = np.zeros((len(trees), budget), dtype=np.int64)
        parents = np.tile(np.arange(budget) - 1, (len(trees), 1))
        alive = np.zeros((len(trees), budget), dtype=np.bool_)
        for row, tree in enumerate(trees):
            tokens[row, : len(tree)] = tree.tokens
            parents[row, : len(tree)] = tree.parents
            alive[row, : len(tree)] = True
        return cls(*(torch.from_numpy(part).to(device) for part in (tokens, parents, alive)))

    def on_host(self) -> list[TokenTree]:
        """One host tree a request, without the dead nodes, which come last."""
        tokens, parents, alive = (
            part.cpu().numpy() for part in (self.tokens, self.parents, self.alive)
        )
        scores = None if self.log_probabilities is None else self.log_probabilities.cpu().numpy()
        depth = np.where(alive, 1, 0)
        above = np.where(alive, parents, ROOT)
        while bool((inner := above != ROOT).any()):
            depth += inner
            above = np.where(inner, np.take_along_axis(parents, above.clip(min=0), axis=1), ROOT)
        return [
            TokenTree.trusted(
                tokens[row, :size],
                parents[row, :size],
                depth[row, :size],
                None if scores is None else scores[row, :size],
            )
            for row, size in enumerate(alive.sum(1).tolist())
        ]


@dataclass(frozen=True)
class TensorWalk:
    """Where the verification walks of b requests led."""

    rows: torch.Tensor
    """int64 [b, K + 1]: the row of the accepted path at each depth (0, the root's, at depth 0 and beyond the path);
    node i is row i + 1."""
    num_accepted: torch.Tensor
    """int64 [b]: accepted nodes."""
    tokens: torch.Tensor
    """int64 [b, K + 1]: what was sampled along the path; only the first ``num_accepted + 1`` mean anything."""


def ancestors(parents: torch.Tensor) -> torch.Tensor:
    """bool [b, K, K]: whether node j is node i or an ancestor of it, from int64 parents [b, K]."""
    size = parents.shape[1]
    nodes = torch.arange(size, device=parents.device)
    reach = (parents[:, :, None] == nodes) | (nodes[:, None] == nodes)
    # Squaring doubles the number of steps that are reached.
    for _ in range((size - 1).bit_length()):
        steps = reach.float()
        reach = (steps @ steps) > 0
    return reach


def depths(parents: torch.Tensor) -> torch.Tensor:
    """int64 [b, K + 1]: the depth of each row, the root's 0 first, from int64 parents [b, K]."""
    return torch.nn.functional.pad(ancestors(parents).sum(-1), (1, 0))


def walk(trees: TreeTensors, sampled: torch.Tensor) -> TensorWalk:
    """Follow the sampled tokens from the root while the tree has them; of equal siblings the first counts.

    Args:
        trees: the trees of b requests.
        sampled: int64 [b, K + 1], what the target drew at the root's row and at each node's.
    """
    parents, tokens, size = trees.parents, trees.tokens, trees.parents.shape[1]
    drawn = trees.alive & (tokens == sampled.gather(1, parents + 1))
    nodes = torch.arange(size, device=parents.device)
    twins = (parents[:, :, None] == parents[:, None, :]) & (nodes < nodes[:, None])
    drawn &= ~(twins & drawn[:, None, :]).any(-1)
    reach = ancestors(parents)
    accepted = (drawn[:, None, :] | ~reach).all(-1)
    depth = torch.where(accepted, reach.sum(-1), 0)
    rows = torch.zeros_like(sampled)
    # Nodes that are not accepted all write a zero at depth 0, which is the root's row.
    rows.scatter_(1, depth, torch.where(accepted, nodes + 1, 0))
    return TensorWalk(rows, accepted.sum(-1), sampled.gather(1, rows))
