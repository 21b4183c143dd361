# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup and its place in the trees: against slow definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_hidden_transfer.drafting.lookup import (
    DEEPEST_COPY,
    LONGEST_MATCH,
    SHARES,
    Copies,
    look_up,
    mixed_in,
)
from vllm_hidden_transfer.evaluation.lookup_shares import Seen, fit_shares
from vllm_hidden_transfer.tree import (
    NO_TOKEN,
    CopiedPaths,
    GivenCandidates,
    most_probable,
    path_major,
)


def newest_longest(context: list[int]) -> tuple[int, list[int]]:
    """The definition, by trying every end of every length."""
    for length in range(min(LONGEST_MATCH, len(context) - 1), 0, -1):
        for end in range(len(context) - 1, length - 1, -1):
            if context[end - length : end] == context[-length:]:
                looped = context[end:] * DEEPEST_COPY
                return length, looped[:DEEPEST_COPY]
    return 0, []


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=4))
def test_the_newest_of_the_longest_matches(contexts: list[list[int]]) -> None:
    copies = look_up([np.array(context, dtype=np.int32) for context in contexts])
    for row, context in enumerate(contexts):
        length, copied = newest_longest(context)
        assert copies.matches[row] == length
        assert copies.tokens[row].tolist() == copied + [NO_TOKEN] * (DEEPEST_COPY - len(copied))


def test_trust_goes_by_match_and_depth_and_ends_with_the_copy() -> None:
    shares = np.arange(LONGEST_MATCH * DEEPEST_COPY).reshape(LONGEST_MATCH, -1) / 64
    tokens = np.full((3, DEEPEST_COPY), NO_TOKEN)
    tokens[0, :2], tokens[1, :1] = (7, 8), 9
    copied = mixed_in(Copies(tokens, np.array([2, 4, 0])), shares)
    assert copied is not None
    found = copied.shares.numpy()
    assert found[0, :3].tolist() == [shares[1, 0], shares[1, 1], 0]
    assert found[1, :2].tolist() == [shares[3, 0], 0]
    assert not found[2].any()
    assert mixed_in(Copies(tokens, np.zeros(3, dtype=np.int64)), shares) is None


def mixture(
    tokens: np.ndarray, scores: np.ndarray, copy: list[int], shares: np.ndarray
) -> dict[tuple[int, ...], float]:
    """Every path's probability, by the definition of ``CopiedPaths``."""
    found: dict[tuple[int, ...], float] = {}
    level: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    for depth in range(max(len(tokens), len(copy))):
        after: list[tuple[tuple[int, ...], float]] = []
        for path, worth in level:
            children: dict[int, float] = {}
            copies = list(path) == copy[:depth] and depth < len(copy)
            share = shares[depth] if copies else 0.0
            if depth < len(tokens):
                row = 0
                if scores.ndim == 3 and depth:
                    where = np.flatnonzero(tokens[depth - 1] == path[-1])
                    row = int(where[0]) if len(where) else 0
                step = scores[depth, row] if scores.ndim == 3 else scores[depth]
                for token, score in zip(tokens[depth].tolist(), step, strict=True):
                    children[token] = (1 - share) * float(np.exp(score))
            if copies:
                children[copy[depth]] = children.get(copy[depth], 0.0) + share
            after += [((*path, token), worth * each) for token, each in children.items()]
        found |= dict(after)
        level = after
    return {path: worth for path, worth in found.items() if worth > 0}


@settings(deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 20),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 5),
    st.booleans(),
)
def test_the_best_tree_of_the_mixture(
    seed: int, budget: int, num_depths: int, width: int, length: int, pairs: bool
) -> None:
    """No tree of so many nodes is more probable, whether a copy's tokens are candidates or not, and below them."""
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.permutation(6)[:width] for _ in range(2 * num_depths)])
    tokens = tokens.reshape(2, num_depths, width)
    shape = (2, num_depths, width, width) if pairs else tokens.shape
    scores = np.log(rng.dirichlet(np.ones(width + 1), size=shape[:-1])[..., :width])
    if pairs:
        scores[:, 0] = scores[:, 0, :1]
    copy = np.full((2, 5), NO_TOKEN)
    copy[:, :length] = rng.integers(0, 7, (2, length))
    shares = np.where(copy == NO_TOKEN, 0.0, rng.random((2, 5)))
    given_candidates = GivenCandidates(torch.from_numpy(tokens), torch.from_numpy(scores))
    copied = CopiedPaths(torch.from_numpy(copy), torch.from_numpy(shares))
    for row, tree in enumerate(
        path_major(most_probable(given_candidates, budget, copied)).on_host()
    ):
        worth = mixture(tokens[row], scores[row], copy[row, :length].tolist(), shares[row])
        assert tree.log_probabilities is not None
        mine = {
            tuple(tree.tokens[tree.path(node)].tolist()): float(np.exp(value))
            for node, value in enumerate(tree.log_probabilities)
        }
        assert len(mine) == min(budget, len(worth))
        assert mine == pytest.approx({path: worth[path] for path in mine})
        best = sorted(worth.values(), reverse=True)[: len(mine)]
        assert sorted(mine.values(), reverse=True) == pytest.approx(best)


def test_the_table_in_use() -> None:
    assert SHARES.shape == (LONGEST_MATCH, DEEPEST_COPY)
    assert ((SHARES >= 0) & (SHARES <= 1)).all()
    assert (np.diff(SHARES.mean(axis=1)) > 0).all()


def test_the_fit_finds_the_shares_that_made_the_data() -> None:
    rng = np.random.default_rng(5)
    observed = []
    for share, match, depth in ((0.2, 1, 0), (0.7, 4, 2), (0.9, 4, 6)):
        for _ in range(4000):
            by_maps = 0.3 if depth < 4 else 0.0  # of whatever token the copy has
            copied = rng.random() < share + (1 - share) * by_maps
            observed.append(Seen(match, depth, by_maps if copied else 0.4 * (depth < 4), copied))
    found = fit_shares(observed)
    assert found[0, 0] == pytest.approx(0.2, abs=0.03)
    assert found[3, 2] == pytest.approx(0.7, abs=0.03)
    assert found[3, 6] == pytest.approx(0.9, abs=0.03)
