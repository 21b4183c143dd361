# SPDX-License-Identifier: Apache-2.0
"""A draft source that knows the answers: it plants the reference's continuation among junk.

The trees are random in shape, different for every request and step, and lie in random topological order, so that
verification meets every kind of tree. Engines in other processes find the answers in a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vllm_hidden_transfer.drafting.source import DraftBatch
from vllm_hidden_transfer.tree import ROOT, TokenTree

ANSWERS_VARIABLE = "HIDDEN_TRANSFER_TEST_ANSWERS"


def write_answers(path: Path, sequences: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Write the reference sequences (prompt and continuation) for engines to come."""
    path.write_text(json.dumps({"vocabulary": vocabulary, "sequences": list(map(list, sequences))}))
    os.environ[ANSWERS_VARIABLE] = str(path)


class Answers:
    """The reference sequences of the test that started this engine."""

    def __init__(self) -> None:
        self._path = Path(os.environ[ANSWERS_VARIABLE])
        self._stamp = 0.0

    def load(self) -> None:
        """Read the file again if the test has written another."""
        stamp = self._path.stat().st_mtime_ns
        if stamp != self._stamp:
            content = json.loads(self._path.read_text())
            self.vocabulary = int(content["vocabulary"])
            self._sequences = [np.array(sequence) for sequence in content["sequences"]]
            self._stamp = stamp

    def continuation(self, tokens: np.ndarray, length: int) -> list[int]:
        """What the reference says after these tokens; empty where it says nothing."""
        size = len(tokens)
        for sequence in self._sequences:
            if len(sequence) > size and (sequence[:size] == tokens).all():
                return list(sequence[size : size + length].tolist())
        return []


class PlantedSource:
    """Trees of the full budget (or fewer nodes) with the continuation somewhere among junk."""

    transfer_layer: int | None = None
    max_path = 6
    limit: int | None = None
    """Nodes at most, below the budget; a test sets it on the class."""

    def __init__(self, vllm_config: object) -> None:
        self.answers = Answers()

    def propose(self, batch: DraftBatch) -> list[TokenTree]:
        self.answers.load()
        return [self.tree(tokens, batch.budget) for tokens in batch.token_ids]

    def describe(self) -> str:
        return "planted drafts (a test)"

    def tree(self, tokens: np.ndarray, budget: int) -> TokenTree:
        """A random tree for one request; the same tokens give the same tree."""
        rng = np.random.default_rng([len(tokens), *tokens[-4:].tolist()])
        truth = self.answers.continuation(tokens, int(rng.integers(1, self.max_path + 1)))
        return random_tree_around(truth, self.num_nodes(rng, budget), self.answers.vocabulary, rng)

    def num_nodes(self, rng: np.random.Generator, budget: int) -> int:
        return min(budget, self.limit or budget)


class FewerNodesSource(PlantedSource):
    """The same with any number of nodes from none to the budget."""

    def num_nodes(self, rng: np.random.Generator, budget: int) -> int:
        return int(rng.integers(0, budget + 1))


class ChainSource(PlantedSource):
    """Chains of the full budget that follow the reference for ``max_path`` tokens at most, then junk."""

    def tree(self, tokens: np.ndarray, budget: int) -> TokenTree:
        rng = np.random.default_rng([len(tokens), *tokens[-4:].tolist()])
        truth = self.answers.continuation(tokens, min(budget, self.max_path))
        junk = rng.integers(0, self.answers.vocabulary, budget - len(truth)).tolist()
        return TokenTree.chain([*truth, *junk])


def random_tree_around(
    truth: Sequence[int], size: int, vocabulary: int, rng: np.random.Generator
) -> TokenTree:
    """A random tree of ``size`` nodes with the path ``truth`` in it (as much of it as fits)."""
    truth = list(truth[:size])
    junk = size - len(truth)
    tokens: list[int] = []
    parents: list[int] = []
    on_path = ROOT
    planted = 0
    # Truth and junk arrive in random order, so the true path is anywhere in the layout.
    for is_truth in rng.permutation([True] * len(truth) + [False] * junk):
        if is_truth:
            tokens.append(truth[planted])
            parents.append(on_path)
            on_path = len(tokens) - 1
            planted += 1
        else:
            tokens.append(int(rng.integers(0, vocabulary)))
            parents.append(int(rng.integers(ROOT, len(tokens) - 1)))
    return TokenTree(np.array(tokens, dtype=np.int64), np.array(parents, dtype=np.int64))


class GuessingSource:
    """Random trees over a small vocabulary that know nothing: for statistics, where drafts must not look at the
    target's random numbers. Siblings repeat, some trees are chains, some are full-width."""

    transfer_layer: int | None = None
    vocabulary = 8

    def __init__(self, vllm_config: object) -> None:
        self._rng = np.random.default_rng(99)

    def describe(self) -> str:
        return "guessed drafts (a test)"

    def propose(self, batch: DraftBatch) -> list[TokenTree]:
        return [self._tree(batch.budget) for _ in batch.token_ids]

    def _tree(self, budget: int) -> TokenTree:
        kind = self._rng.integers(0, 3)
        if kind == 0:
            return TokenTree.chain(self._rng.integers(0, self.vocabulary, budget))
        if kind == 1:
            width = min(budget, self.vocabulary)
            first = self._rng.permutation(self.vocabulary)[:width]
            second = self._rng.integers(0, self.vocabulary, budget - width)
            parents = [*[ROOT] * width, *self._rng.integers(0, width, budget - width)]
            return TokenTree(np.array([*first, *second]), np.array(parents))
        return random_tree_around([], budget, self.vocabulary, self._rng)
