# SPDX-License-Identifier: Apache-2.0
"""Token trees as data: order, mask, positions, runs, truncation, the best tree of a budget, the walk."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_hidden_transfer.tree import (
    ROOT,
    TokenTree,
    VerificationWalk,
    limit_runs,
    most_probable_paths,
)


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 24) -> TokenTree:
    size = draw(st.integers(0, max_nodes))
    parents = [draw(st.integers(ROOT, node - 1)) for node in range(size)]
    tokens = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
    return TokenTree(np.array(tokens, dtype=np.int64), np.array(parents, dtype=np.int64))


def ancestors(tree: TokenTree, node: int) -> set[int]:
    found = set()
    while node != ROOT:
        found.add(node)
        node = int(tree.parents[node])
    return found


@given(trees())
def test_mask_is_self_ancestors_and_root(tree: TokenTree) -> None:
    mask = tree.mask()
    assert mask[0].tolist() == [True] + [False] * len(tree)
    for node in range(len(tree)):
        visible = {other for other in range(len(tree)) if mask[node + 1, other + 1]}
        assert visible == ancestors(tree, node)
        assert mask[node + 1, 0]


@given(trees(), st.integers(0, 1000))
def test_positions_are_root_plus_depth(tree: TokenTree, root_position: int) -> None:
    positions = tree.positions(root_position)
    assert positions[0] == root_position
    for node in range(len(tree)):
        assert positions[node + 1] == root_position + len(tree.path(node))


@given(trees(), st.integers(0, 30))
def test_truncation_keeps_a_tree(tree: TokenTree, size: int) -> None:
    cut = tree.truncated(size)
    assert len(cut) == min(size, len(tree))
    assert cut.tokens.tolist() == tree.tokens[: len(cut)].tolist()
    assert cut.depths.tolist() == tree.depths[: len(cut)].tolist()
    rows = len(cut) + 1
    assert (cut.mask() == tree.mask()[:rows, :rows]).all()


@given(trees())
def test_runs_are_tails_of_single_paths(tree: TokenTree) -> None:
    starts = [*tree.run_starts.tolist(), len(tree) + 1]
    assert starts[0] == 0
    for start, end in itertools.pairwise(starts):
        last = end - 2  # the node of the run's last row; the root for the run of row 0 alone
        path = [] if last < 0 else tree.path(last).tolist()
        assert [row - 1 for row in range(max(start, 1), end)] == path[
            len(path) - (end - max(start, 1)) :
        ]
    assert tree.is_chain == (tree.parents.tolist() == list(range(-1, len(tree) - 1)))


@given(trees())
def test_paths_cover_every_node(tree: TokenTree) -> None:
    paths = tree.paths()
    assert {node for path in paths for node in path.tolist()} == set(range(len(tree)))
    assert len({int(path[-1]) for path in paths}) == len(paths)


@given(trees(), st.integers(1, 8))
def test_limited_runs_is_a_prefix(tree: TokenTree, max_runs: int) -> None:
    limited = limit_runs(tree, max_runs)
    assert len(limited.run_starts) <= max_runs
    assert limited.tokens.tolist() == tree.tokens[: len(limited)].tolist()


@given(trees())
def test_from_paths_round_trip(tree: TokenTree) -> None:
    paths = [tuple(tree.tokens[path].tolist()) for path in tree.paths()]
    rebuilt = TokenTree.from_paths(paths)
    assert {tuple(rebuilt.tokens[path].tolist()) for path in rebuilt.paths()} <= set(paths)
    for path in paths:
        node = ROOT
        for token in path:
            child = rebuilt.child(node, token)
            assert child is not None
            node = child


@pytest.mark.parametrize(
    ("tokens", "parents"), [([1], [0]), ([1, 2], [-1]), ([1], [-2]), ([1, 1], [-1, 1])]
)
def test_not_a_tree_is_refused(tokens: list[int], parents: list[int]) -> None:
    with pytest.raises(ValueError, match="token tree"):
        TokenTree(np.array(tokens), np.array(parents))


@st.composite
def distributions(draw: st.DrawFn) -> np.ndarray:
    depths, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.dirichlet(np.ones(width + 1), size=depths)[:, :width]


@given(distributions(), st.integers(1, 20))
def test_the_best_tree_has_the_most_probable_paths(probabilities: np.ndarray, budget: int) -> None:
    depths, width = probabilities.shape
    tokens = np.broadcast_to(np.arange(width), (1, depths, width))
    (tree,) = most_probable_paths(tokens, np.log(probabilities)[None], budget)
    everything = [
        float(np.prod([probabilities[depth, token] for depth, token in enumerate(path)]))
        for length in range(1, depths + 1)
        for path in itertools.product(range(width), repeat=length)
    ]
    got = [
        float(np.prod(probabilities[np.arange(len(path)), tree.tokens[path]]))
        for path in (tree.path(node) for node in range(len(tree)))
    ]
    assert len(tree) == min(budget, len(everything))
    assert np.allclose(sorted(got, reverse=True), sorted(everything, reverse=True)[: len(got)])
    leaves = len(tree.paths())
    assert len(tree.run_starts) == leaves
    # The first run is the most probable path of its length.
    first_run = tree.run_starts.tolist()[1] - 1 if leaves > 1 else len(tree)
    assert tree.tokens[:first_run].tolist() == probabilities.argmax(axis=1)[:first_run].tolist()


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 20))
def test_the_best_tree_of_candidates_that_depend_on_the_one_before(
    seed: int, depths: int, width: int, budget: int
) -> None:
    rng = np.random.default_rng(seed)
    after = rng.dirichlet(np.ones(width + 1), size=(depths, width))[..., :width]
    after[0] = after[0, :1]
    tokens = np.broadcast_to(np.arange(width), (1, depths, width))
    (tree,) = most_probable_paths(tokens, np.log(after)[None], budget)

    def probability(path: Sequence[int]) -> float:
        before = [0, *path[:-1]]
        return float(
            np.prod([after[d, b, t] for d, (b, t) in enumerate(zip(before, path, strict=True))])
        )

    everything = [
        probability(path)
        for length in range(1, depths + 1)
        for path in itertools.product(range(width), repeat=length)
    ]
    got = [probability(tree.tokens[tree.path(node)].tolist()) for node in range(len(tree))]
    assert len(tree) == min(budget, len(everything))
    assert np.allclose(sorted(got, reverse=True), sorted(everything, reverse=True)[: len(got)])


def test_impossible_candidates_never_enter_a_tree() -> None:
    scores = np.array([[[0.0, -np.inf], [np.nan, -1.0]]])
    tokens = np.array([[[7, 8], [9, 10]]])
    (tree,) = most_probable_paths(tokens, scores, 8)
    assert tree.tokens.tolist() == [7, 10]
    assert tree.parents.tolist() == [ROOT, 0]


@given(st.lists(trees(), max_size=5), st.integers(0, 2**32 - 1))
def test_the_walk_follows_sampled_tokens(batch: list[TokenTree], seed: int) -> None:
    rng = np.random.default_rng(seed)
    walk = VerificationWalk(batch)
    draws = 0
    while walk.active:
        sampled = rng.integers(0, 6, len(walk.active)).tolist()
        draws += len(sampled)
        walk.advance(sampled)
    assert draws == sum(len(tokens) for tokens in walk.tokens)
    for tree, node, tokens in zip(batch, walk.nodes, walk.tokens, strict=True):
        accepted, bonus = tokens[:-1], tokens[-1]
        assert tree.tokens[tree.path(node)].tolist() == accepted
        assert tree.child(node, bonus) is None


def test_a_request_without_a_tree_samples_once() -> None:
    walk = VerificationWalk([None, TokenTree.chain([3, 4])])
    walk.advance([3, 3])
    assert walk.active == [1]
    walk.advance([4])
    walk.advance([9])
    assert walk.tokens == [[3], [3, 4, 9]]
    assert walk.nodes == [ROOT, 1]
