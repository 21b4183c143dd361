# SPDX-License-Identifier: Apache-2.0
"""Drafts without maps: best-first trees, recycled successors and copies, against slow definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_hidden_transfer.drafting.frequencies import PRIOR_WEIGHT, REMEMBERED, Frequencies
from vllm_hidden_transfer.drafting.recycling import WIDTH, Successors, best_guesses
from vllm_hidden_transfer.drafting.text import TextDrafts
from vllm_hidden_transfer.tree import (
    ROOT,
    GivenCandidates,
    TokenTree,
    TreeTensors,
    best_first,
    in_runs,
    most_probable,
    path_major,
)

VOCABULARY = 50


def paths_of(tree: TokenTree) -> dict[tuple[int, ...], float]:
    """Probability of every path."""
    return {
        tuple(tree.tokens[tree.path(node)].tolist()): float(probability)
        for node, probability in enumerate(tree.path_probabilities())
    }


@given(st.integers(1, 14), st.integers(0, 10_000))
def test_best_first_is_the_builder_of_tensors(budget: int, seed: int) -> None:
    """The same trees where every node of a depth has the same children."""
    shares = np.random.default_rng(seed).random((3, 4))
    shares /= shares.sum(1, keepdims=True) * 1.1

    def children(depth: int) -> list[tuple[int, float, int]]:
        if depth == 3:
            return []
        return [(token, float(share), depth + 1) for token, share in enumerate(shares[depth])]

    found = best_first(0, children, budget)
    tokens = torch.arange(4).expand(1, 3, 4)
    given_candidates = GivenCandidates(tokens, torch.from_numpy(np.log(shares))[None])
    (wanted,) = most_probable(given_candidates, budget).on_host()
    ours, theirs = paths_of(found), paths_of(wanted)
    assert len(ours) == len(theirs) == budget
    assert sum(ours.values()) == pytest.approx(sum(theirs.values()))
    assert (np.diff(found.path_probabilities()) <= 1e-12).all()


@given(st.lists(st.integers(-1, 30), min_size=1, max_size=24))
def test_runs_are_those_of_the_tensors(numbers: list[int]) -> None:
    parents = [min(number, node - 1) for node, number in enumerate(numbers)]
    size = len(parents)
    tree = TokenTree(np.arange(size), np.array(parents), -np.arange(size) / 10)
    tensors = TreeTensors.of([tree], size, torch.device("cpu"))
    (wanted,) = path_major(tensors).on_host()
    found = in_runs(tree)
    assert found.tokens.tolist() == wanted.tokens.tolist()
    assert found.parents.tolist() == wanted.parents.tolist()
    assert found.depths.tolist() == wanted.depths.tolist()
    assert found.log_probabilities is not None
    assert found.log_probabilities.tolist() == (-found.tokens / 10).tolist()


def test_an_improbable_path_is_left_out() -> None:
    tree = best_first(0, lambda depth: [(depth, 0.5, depth + 1)], 16, least=0.1)
    assert len(tree) == 3
    assert math.exp(tree.log_probabilities[-1]) == pytest.approx(0.125)  # type: ignore[index]
    assert len(best_first(0, lambda _: [], 16)) == 0


def test_frequencies_start_at_the_prior_and_follow_what_comes() -> None:
    one = Frequencies(np.array([[0.5, 0.9]]))
    assert one.values.tolist() == [[0.5, 0.9]]
    one.observe((np.zeros(4, dtype=int), np.array([0, 0, 0, 1])), [True, True, False, False])
    assert one.values[0, 0] == (0.5 * PRIOR_WEIGHT + 2) / (PRIOR_WEIGHT + 3)
    assert one.values[0, 1] == 0.9 * PRIOR_WEIGHT / (PRIOR_WEIGHT + 1)
    for _ in range(int(3 * REMEMBERED)):
        one.observe(([0], [0]), [False])
    assert one.values[0, 0] < 0.01
    for _ in range(int(REMEMBERED)):  # old evidence has made room
        one.observe(([0], [0]), [True])
    assert one.values[0, 0] > 0.6


def guesses(*successors: int, first: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """A row of a table: these successors first, and their probabilities."""
    others = [token for token in range(30, 30 + WIDTH) if token not in successors]
    row = np.array([*successors, *others][:WIDTH])
    return row, np.array([first, *[(1 - first) / (WIDTH - 1)] * (WIDTH - 1)])


@pytest.mark.parametrize("vocabulary", [WIDTH, 1000, 1024, 4096])
def test_best_guesses_are_the_best(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, vocabulary, generator=generator)
    logits[0, 64 * (vocabulary > 600) :][:7] = 9.0  # many in one chunk
    logits[1, 3] = torch.nan
    logits[2, 5:] = -torch.inf
    tokens, probabilities = best_guesses(logits)
    for row in (0, 2, 3, 4):
        best, _ = logits[row].topk(WIDTH)
        assert logits[row, tokens[row]].tolist() == best.tolist()
        assert probabilities[row].tolist() == pytest.approx(best.softmax(-1).tolist())
    assert probabilities[1].isnan().any()
    assert len(set(tokens[0].tolist())) == WIDTH


def test_successors_are_the_latest_guesses() -> None:
    table = Successors(VOCABULARY)
    assert table.after(3) == []
    for first in (7, 9):
        row, probabilities = guesses(first)
        table.learn(np.array([3]), row[None], probabilities[None])
    found = table.after(3)
    assert found[0][0] == 9
    assert 7 not in dict(found)
    assert sum(share for _, share in found) <= 1 + 1e-9
    assert max(found, key=lambda one: one[1])[0] == 9
    assert table.after(4) == []


def test_what_cannot_be_used_is_not_learned() -> None:
    table = Successors(VOCABULARY)
    row, probabilities = guesses(7)
    broken = probabilities.copy()
    broken[2] = math.nan
    # A row of NaN, a token beside the vocabulary (an embedded prompt has none), and masked guesses.
    masked = np.where(np.arange(WIDTH) < 2, 0.5, 0.0)
    table.learn(
        np.array([1, VOCABULARY, -1, 2]),
        np.stack([row] * 4),
        np.stack([broken, probabilities, probabilities, masked]),
    )
    assert table.after(1) == []
    assert [token for token, _ in table.after(2)] == row[:2].tolist()


def test_guesses_are_trusted_as_far_as_they_come_true() -> None:
    rng = np.random.default_rng(0)
    table = Successors(VOCABULARY)
    right, probabilities = guesses(7, first=0.95)
    wrong, _ = guesses(8)
    for _ in range(400):
        row = right if rng.random() < 0.3 else wrong
        table.learn(np.array([3]), row[None], probabilities[None])
    # The first guess comes again where two rounds give the same: 0.3 * 0.3 + 0.7 * 0.7.
    assert dict(table.after(3))[int(table._tokens[3, 0])] == pytest.approx(0.58, abs=0.1)


def test_a_prompt_warms_what_is_not_known() -> None:
    drafts = TextDrafts(["recycling"], VOCABULARY)
    assert drafts.successors is not None
    row, probabilities = guesses(7)
    drafts.successors.learn(np.array([3]), row[None], probabilities[None])
    context = np.array([3, 5, 6, 3, 4, 5])
    (tree,) = drafts.propose(["a"], [context], 4)
    assert tree.tokens[0] == 6
    assert drafts.successors.after(3)[0][0] == 7
    drafts.propose(["a"], [np.array([9, 10, 9])], 4)  # it is no new prompt
    assert drafts.successors.after(9) == []
    drafts.forget("a")
    drafts.propose(["a"], [np.array([9, 10, 9])], 4)
    assert drafts.successors.after(9)[0][0] == 10
    drafts.propose(["b"], [np.array([12])], 4)  # of one token, and of an unknown one


def test_copies_alone_are_a_chain() -> None:
    drafts = TextDrafts(["lookup"], VOCABULARY)
    context = np.array([1, 2, 3, 4, 5, 6, 1, 2, 3])
    tree, nothing = drafts.propose(["a", "b"], [context, np.array([1, 2, 3])], 4)
    assert tree.tokens.tolist() == [4, 5, 6, 1]
    assert tree.is_chain
    assert (np.diff(tree.path_probabilities()) < 0).all()
    assert len(nothing) == 0


def test_copies_and_successors_in_one_tree() -> None:
    drafts = TextDrafts(["recycling", "lookup"], VOCABULARY)
    assert drafts.successors is not None
    for token, successor in ((3, 20), (4, 5), (20, 21)):
        row, probabilities = guesses(successor)
        drafts.successors.learn(np.array([token]), row[None], probabilities[None])
    (tree,) = drafts.propose(["a"], [np.array([2, 3, 4, 5, 9, 9, 9, 2, 3])], 16)
    paths = paths_of(tree)
    assert {(4,), (4, 5), (20,), (20, 21)} <= set(paths)
    assert paths[4,] > 0.2
    # What both say is more probable than what one says.
    alone = TextDrafts(["lookup"], VOCABULARY)
    (copied,) = alone.propose(["a"], [np.array([2, 3, 4, 5, 9, 9, 9, 2, 3])], 16)
    assert paths[4, 5] > paths_of(copied)[4, 5] * 0.99
    children = {
        token for token, parent in zip(tree.tokens, tree.parents, strict=True) if parent == ROOT
    }
    assert len(children) == (tree.parents == ROOT).sum()  # no token twice


def trust_after(continuation: list[int]) -> float:
    """Probability of a copy's first token behind one matched token, after a text that was drafted for now and then."""
    drafts = TextDrafts(["lookup"], VOCABULARY)
    block = list(range(10, 22))
    for end in range(1, len(continuation) + 1, 3):  # two of three steps had no drafts
        drafts.propose(["a"], [np.array([*block, block[0], *continuation[:end]])], 8)
    (tree,) = drafts.propose(["b"], [np.array([*block, block[0]])], 8)
    return float(tree.path_probabilities()[0])


def test_trust_in_copies_is_learned_from_the_text() -> None:
    prior = trust_after([])
    # One token of the block and one that is new, so that every copy is wrong at once.
    assert trust_after([token for one in range(11, 21) for token in (30 + one % 3, one)]) < prior
    loop = [token for _ in range(150) for token in (40, 41, 42)]
    drafts = TextDrafts(["lookup"], VOCABULARY)
    for end in range(4, len(loop)):
        (tree,) = drafts.propose(["a"], [np.array(loop[:end])], 8)
    assert tree.path_probabilities()[3] > 0.75


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=40), min_size=1, max_size=4))
def test_any_text_gives_trees(contexts: list[list[int]]) -> None:
    drafts = TextDrafts(["recycling", "lookup"], 6)
    rng = np.random.default_rng(len(contexts))
    ids = [str(one) for one in range(len(contexts))]
    for _ in range(3):
        rows = np.array([tokens[-1] for tokens in contexts])
        assert drafts.successors is not None
        drafts.successors.learn(
            rows, rng.integers(0, 6, (len(rows), WIDTH)), rng.random((len(rows), WIDTH))
        )
        trees = drafts.propose(ids, [np.array(tokens) for tokens in contexts], 8)
        for tree, tokens in zip(trees, contexts, strict=True):
            TokenTree(tree.tokens, tree.parents)  # topological
            assert len(tree) <= 8
            assert (tree.path_probabilities() <= 1 + 1e-9).all()
            tokens.append(int(tree.tokens[0]) if len(tree) else 0)
