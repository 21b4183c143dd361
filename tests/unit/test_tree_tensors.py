# SPDX-License-Identifier: Apache-2.0
"""The tensor twins of token trees say what the host's trees say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_tree import trees as host_trees
from vllm_hidden_transfer.tree import (
    ROOT,
    GivenCandidates,
    TokenTree,
    TreeTensors,
    VerificationWalk,
    most_probable,
    path_major,
    tensors,
)

CPU = torch.device("cpu")


def of(trees: list[TokenTree], budget: int) -> TreeTensors:
    return TreeTensors.of(trees, budget, CPU)


def paths(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(tree.tokens[tree.path(node)].tolist()) for node in range(len(tree))}


def live_paths(trees: TreeTensors, request: int) -> set[tuple[int, ...]]:
    count = int(trees.alive[request].sum())
    assert trees.alive[request, :count].all(), "dead nodes come last"
    tokens, parents = trees.tokens[request, :count], trees.parents[request, :count]
    return paths(TokenTree(tokens.numpy(), parents.numpy()))


@given(st.lists(host_trees(), min_size=1, max_size=3))
def test_ancestors_and_depths(trees: list[TokenTree]) -> None:
    batch = of(trees, 25)
    reach, depth = tensors.ancestors(batch.parents), tensors.depths(batch.parents)
    for row, tree in enumerate(trees):
        size = len(tree)
        assert reach[row, :size, :size].tolist() == tree.mask()[1:, 1:].tolist()
        assert depth[row, : size + 1].tolist() == tree.positions(0).tolist()
        padded = TokenTree(np.zeros(25, dtype=np.int64), batch.parents[row].numpy())
        assert depth[row].tolist() == padded.positions(0).tolist()


@given(
    st.lists(host_trees(), min_size=1, max_size=3),
    st.lists(st.integers(0, 5), min_size=75, max_size=75),
)
def test_walk(trees: list[TokenTree], drawn: list[int]) -> None:
    batch = of(trees, 24)
    sampled = torch.tensor(drawn).view(3, 25)[: len(trees)]
    found = tensors.walk(batch, sampled)
    walk = VerificationWalk(trees)
    while walk.active:
        walk.advance([int(sampled[row, walk.nodes[row] + 1]) for row in walk.active])
    for row, tree in enumerate(trees):
        accepted = int(found.num_accepted[row])
        assert found.tokens[row, : accepted + 1].tolist() == walk.tokens[row]
        path = [0, *(tree.path(walk.nodes[row]) + 1).tolist()] if walk.nodes[row] != ROOT else [0]
        assert found.rows[row].tolist() == path + [0] * (25 - len(path))


@settings(deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 3), st.integers(1, 5), st.booleans()
)
def test_most_probable(seed: int, budget: int, num_depths: int, width: int, pairs: bool) -> None:
    """No other tree of so many nodes is more probable, also where paths tie and candidates are unusable."""
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.permutation(9)[:width] for _ in range(2 * num_depths)])
    tokens = tokens.reshape(2, num_depths, width)
    shape = (2, num_depths, width, width) if pairs else tokens.shape
    scores = -np.sort(rng.integers(0, 5, shape) / 4, axis=-1)
    if pairs:
        scores[:, 0] = scores[:, 0, :1]
    scores[rng.random(shape) < 0.1] = rng.choice([np.nan, -np.inf])
    if pairs:
        scores[:, 0] = scores[:, 0, :1]
    given = GivenCandidates(torch.from_numpy(tokens), torch.from_numpy(scores))
    best = most_probable(given, budget)
    assert best.log_probabilities is not None
    for found in (best, path_major(best)):
        assert found.parents.shape == (2, budget)
        assert bool((found.parents < torch.arange(budget)).all())
        for row, tree in enumerate(found.on_host()):
            assert paths(tree) == live_paths(found, row)
            checked = TokenTree(tree.tokens, tree.parents)
            assert tree.depths.tolist() == checked.depths.tolist()
            worth = _worth(tokens[row], scores[row])
            probable = sorted(worth.values(), reverse=True)[: len(tree)]
            assert len(tree) == min(budget, len(worth))
            assert tree.log_probabilities is not None
            mine = {
                tuple(tree.tokens[tree.path(node)].tolist()): float(value)
                for node, value in enumerate(tree.log_probabilities)
            }
            assert mine == pytest.approx({path: worth[path] for path in mine})
            assert sorted(mine.values(), reverse=True) == pytest.approx(probable)
            if found is not best:
                assert len(tree.run_starts) == max(len(tree.paths()), 1)


def _worth(tokens: np.ndarray, scores: np.ndarray) -> dict[tuple[int, ...], float]:
    """Every usable path's log-probability."""
    found: dict[tuple[int, ...], float] = {}
    width = tokens.shape[1]
    level: list[tuple[tuple[int, ...], int, float]] = [((), 0, 0.0)]
    for depth in range(len(tokens)):
        after: list[tuple[tuple[int, ...], int, float]] = []
        for path, before, worth in level:
            for choice in range(width):
                step = scores[depth, before, choice] if scores.ndim == 3 else scores[depth, choice]
                if np.isfinite(step):
                    after.append(((*path, int(tokens[depth, choice])), choice, worth + step))
        found |= {path: worth for path, _, worth in after}
        level = after
    return found
