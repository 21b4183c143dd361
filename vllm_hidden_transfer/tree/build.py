# SPDX-License-Identifier: Apache-2.0
"""Build trees: the n most probable paths of per-depth draft distributions.

For a deterministic tree the expected number of accepted tokens is the sum of the target's path probabilities over
the nodes, so under the draft distribution the best tree of n nodes is the n most probable paths (the best-first tree
of DDTree, https://github.com/liranringel/ddtree, and of EAGLE-2, arXiv 2406.16858, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_hidden_transfer.tree.token_tree import ROOT, TokenTree

FloatArray = NDArray[np.float64]


def most_probable_paths(
    tokens: NDArray[np.int64], log_probabilities: FloatArray, budget: int
) -> list[TokenTree]:
    """The ``budget`` most probable paths of every request, as trees in path-major order.

    Args:
        tokens: int64 [requests, depths, width], candidate tokens of each depth, distinct within a depth.
        log_probabilities: float64 of the same shape, the candidates' draft log-probabilities, or
            [requests, depths, width, width], those after each candidate of the depth before. Candidates that are -inf
            or NaN never enter a tree.
        budget: number of nodes at most.

    Returns:
        One tree a request, with at most ``budget`` nodes. Ties go to the shallower path.
    """
    num_requests, num_depths, width = tokens.shape
    scores = np.where(np.isnan(log_probabilities), -np.inf, log_probabilities)
    if scores.ndim == 3:
        scores = scores[:, :, None]
    beam_choices = np.zeros((num_requests, 1), dtype=np.int64)
    beam_scores = np.zeros((num_requests, 1))
    beam_parents = np.full((num_requests, 1), ROOT)
    levels: list[tuple[NDArray[np.int64], NDArray[np.int64], FloatArray]] = []
    level_start = 0
    for depth in range(num_depths):
        # A node of the best tree is among the ``budget`` best of its own depth, so a beam loses nothing.
        rows = np.minimum(beam_choices, scores.shape[2] - 1)
        after = np.take_along_axis(scores[:, depth], rows[:, :, None], axis=1)
        flat = (beam_scores[:, :, None] + after).reshape(num_requests, -1)
        keep = min(budget, flat.shape[1])
        best = np.argsort(-flat, axis=1, kind="stable")[:, :keep]
        beam_scores = np.take_along_axis(flat, best, axis=1)
        beam_choices = best % width
        level_tokens = np.take_along_axis(tokens[:, depth], beam_choices, axis=1)
        level_parents = np.take_along_axis(beam_parents, best // width, axis=1)
        levels.append((level_tokens, level_parents, beam_scores))
        beam_parents = np.broadcast_to(level_start + np.arange(keep), (num_requests, keep))
        level_start += keep
    all_tokens, all_parents, all_scores = (
        np.concatenate(part, axis=1) for part in zip(*levels, strict=True)
    )
    order = np.argsort(-all_scores, axis=1, kind="stable")[:, :budget]
    return [
        _path_major(all_tokens[row], all_parents[row], all_scores[row], order[row])
        for row in range(num_requests)
    ]


def _path_major(
    tokens: NDArray[np.int64],
    parents: NDArray[np.int64],
    scores: FloatArray,
    chosen: NDArray[np.int64],
) -> TokenTree:
    """Lay the chosen nodes (best first) out so that every run is as long as can be: a path's rows stay together.

    The most probable path comes first: its rows need no copy of the cache. The other runs follow in the order of
    their first node, so that a tree which the scheduler cuts loses its least probable runs.
    """
    chosen = chosen[np.isfinite(scores[chosen])]
    children: dict[int, list[int]] = {}
    parent_of = dict(zip(chosen.tolist(), parents[chosen].tolist(), strict=True))
    for node, parent in parent_of.items():
        children.setdefault(parent, []).append(node)
    place: dict[int, int] = {ROOT: ROOT}
    ordered: list[int] = []
    for start in parent_of:
        run: int | None = start
        while run is not None and run not in place:
            place[run] = len(ordered)
            ordered.append(run)
            run = next(iter(children.get(run, ())), None)
    new_parents = np.array([place[parent_of[node]] for node in ordered], dtype=np.int64)
    return TokenTree(tokens[ordered], new_parents)


def limit_runs(tree: TokenTree, max_runs: int) -> TokenTree:
    """The tree with its first ``max_runs`` runs only (at least the first).

    Later runs hang off earlier rows, never the other way, so what is left is a tree.
    """
    starts: Sequence[int] = tree.run_starts.tolist()
    if len(starts) <= max(max_runs, 1):
        return tree
    return tree.truncated(starts[max(max_runs, 1)] - 1)
