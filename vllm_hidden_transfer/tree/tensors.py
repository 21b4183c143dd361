# SPDX-License-Identifier: Apache-2.0
"""Trees of a batch as tensors on the device: build, ancestors, depths, walk. Nothing here waits for the device.

The tensor twins of ``token_tree``, ``build`` and ``walk``, for a runner that never knows on the host what was drafted
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


def most_probable(
    tokens: torch.Tensor, log_probabilities: torch.Tensor, budget: int
) -> TreeTensors:
    """The ``budget`` most probable paths of every request, best first: the nodes of ``build.most_probable_paths``.

    Args:
        tokens: int64 [b, depths, width], candidates of each depth, distinct within a depth.
        log_probabilities: float64 of the same shape, or [b, depths, width, width], those after each candidate of the
            depth before; candidates that are -inf or NaN never live.
        budget: nodes of each tree, dead ones included.
    """
    scores = log_probabilities.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    num_requests, num_depths, width = tokens.shape
    if scores.dim() == 3:
        scores = scores[:, :, None]
    beam_choices = tokens.new_zeros(num_requests, 1)
    beam_scores = scores.new_zeros(num_requests, 1)
    beam_nodes = tokens.new_full((num_requests, 1), ROOT)
    levels: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    first = 0
    for depth in range(num_depths):
        # A node of the best tree is among the ``budget`` best of its own depth, so a beam loses nothing.
        rows = beam_choices.clamp(max=scores.shape[2] - 1)[:, :, None].expand(-1, -1, width)
        flat = (beam_scores[:, :, None] + scores[:, depth].gather(1, rows)).flatten(1)
        keep = min(budget, flat.shape[1])
        beam_scores, best = _best(flat, keep)
        parent, beam_choices = beam_nodes.gather(1, best // width), best % width
        levels.append((tokens[:, depth].gather(1, beam_choices), parent, beam_scores))
        beam_nodes = torch.arange(first, first + keep, device=tokens.device).expand(
            num_requests, keep
        )
        first += keep
    all_tokens, all_parents, all_scores = (
        torch.cat(part, dim=1) for part in zip(*levels, strict=True)
    )
    return _take(all_tokens, all_parents, all_scores, budget)


def _best(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest scores of each row, best first, and their places; of equal ones the first counts."""
    ordered, places = scores.sort(dim=1, descending=True, stable=True)
    return ordered[:, :count], places[:, :count]


def _take(
    tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor, budget: int
) -> TreeTensors:
    """The best nodes in the order of their scores, which no parent follows its child in."""
    ordered, places = scores.sort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(places)
    rank.scatter_(1, places, torch.arange(places.shape[1], device=places.device).expand_as(places))
    new_parents = torch.where(parents == ROOT, ROOT, rank.gather(1, parents.clamp(min=0)))
    found = min(budget, places.shape[1])
    missing = (0, budget - found)
    pad = torch.nn.functional.pad
    alive = pad(ordered[:, :found].isfinite(), missing)
    chosen_tokens = pad(tokens.gather(1, places[:, :found]), missing)
    chosen_parents = pad(new_parents.gather(1, places[:, :found]), missing)
    before = torch.arange(budget, device=tokens.device) - 1
    return TreeTensors(
        torch.where(alive, chosen_tokens, 0), torch.where(alive, chosen_parents, before), alive
    )
