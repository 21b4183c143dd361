# SPDX-License-Identifier: Apache-2.0
"""Draft sources that know the answers: they plant a reference's continuation among junk.

For tests of verification, which must meet every kind of tree, and for step costs, where both sides must accept alike.
Engines in other processes find the answers in a file named by an environment variable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_hidden_transfer.drafting.source import DraftBatch, DraftSource
from vllm_hidden_transfer.tree import ROOT, TokenTree, most_probable_paths

ANSWERS_VARIABLE = "VLLM_HIDDEN_TRANSFER_PLANTED_ANSWERS"

Tokens = NDArray[np.int32]


def write_answers(path: Path, sequences: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Write the reference sequences (prompt and continuation) for engines to come."""
    path.write_text(json.dumps({"vocabulary": vocabulary, "sequences": list(map(list, sequences))}))
    os.environ[ANSWERS_VARIABLE] = str(path)


class Answers:
    """The reference sequences in the file."""

    def __init__(self) -> None:
        self._path = Path(os.environ[ANSWERS_VARIABLE])
        self._stamp = 0
        self._sequences: dict[int, list[NDArray[np.int64]]] = {}
        """By their first token, because a soak has hundreds of them."""
        self.vocabulary = 0

    def load(self) -> None:
        """Read the file again if it has changed."""
        stamp = self._path.stat().st_mtime_ns
        if stamp != self._stamp:
            content = json.loads(self._path.read_text())
            self.vocabulary = int(content["vocabulary"])
            self._sequences = {}
            for tokens in content["sequences"]:
                self._sequences.setdefault(tokens[0], []).append(np.array(tokens))
            self._stamp = stamp

    def continuation(self, tokens: Tokens, length: int) -> list[int]:
        """What the reference says after these tokens; empty where it says nothing."""
        size = len(tokens)
        for sequence in self._sequences.get(int(tokens[0]), ()):
            if len(sequence) > size and (sequence[:size] == tokens).all():
                return list(sequence[size : size + length].tolist())
        return []


class PlantedSource(DraftSource):
    """Random trees with the continuation somewhere among junk, different for every request and step."""

    max_path = 6
    limit: int | None = None
    """Nodes at most, below the budget; a test sets it on the class."""
    first: bool = False
    """Truth on the first path, as real drafts have their best guess there; a test sets it on the class."""

    def __init__(self, runner: object) -> None:
        self.answers = Answers()

    def describe(self) -> str:
        return "planted drafts (a measurement)"

    def on_target_loaded(self, model: object) -> None:
        """It needs nothing of the target."""

    def propose(self, batch: DraftBatch) -> list[TokenTree]:
        self.answers.load()
        return [self.tree(tokens, batch.budget) for tokens in batch.token_ids]

    def tree(self, tokens: Tokens, budget: int) -> TokenTree:
        """A random tree for one request; the same tokens give the same tree."""
        rng = _rng_for(tokens)
        truth = self.answers.continuation(tokens, int(rng.integers(1, self.max_path + 1)))
        size, vocabulary = self.num_nodes(rng, budget), self.answers.vocabulary
        return random_tree_around(truth, size, vocabulary, rng, first=self.first)

    def num_nodes(self, rng: np.random.Generator, budget: int) -> int:
        """How many nodes the next tree gets."""
        return min(budget, self.limit or budget)


class FewerNodesSource(PlantedSource):
    """The same with any number of nodes from none to the budget."""

    def num_nodes(self, rng: np.random.Generator, budget: int) -> int:
        return int(rng.integers(0, budget + 1))


class GuessingSource(DraftSource):
    """Trees over a small vocabulary that know nothing: for statistics, where drafts must not look at the target's
    random numbers. Siblings repeat, some trees are chains, some are full-width."""

    vocabulary = 8

    def __init__(self, runner: object) -> None:
        self._rng = np.random.default_rng(99)

    def describe(self) -> str:
        return "guessed drafts (a measurement)"

    def on_target_loaded(self, model: object) -> None:
        """It needs nothing of the target."""

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


@dataclass(frozen=True)
class Shape:
    """What a step-cost measurement plants: the same accepted tokens, in a chain or in a bushy tree."""

    kind: str
    """"chain", "bushy" (laid out best-first, like real drafts) or "none"."""
    nodes: int
    accepted: int = 2
    """Tokens of the reference that are planted; what follows is junk."""


RANK_PROBABILITIES = (0.5, 0.17, 0.09, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01, 0.008)
"""How likely the target's token is a draft distribution's first, second, ... : gives bushy trees a realistic form."""


def planted_tree(shape: Shape, answers: Answers, tokens: Tokens) -> TokenTree:
    """The tree of this shape after these tokens; the same tokens give the same tree."""
    if shape.kind == "none":  # before anything that would cost time in a step without drafts
        return TokenTree.chain([])
    rng = _rng_for(tokens)
    truth = answers.continuation(tokens, shape.accepted)
    if shape.kind == "chain":
        truth = truth[: shape.nodes]
        junk = rng.integers(0, answers.vocabulary, shape.nodes - len(truth))
        return TokenTree.chain([*truth, *junk.tolist()])
    depths, width = 4, len(RANK_PROBABILITIES)
    candidates = rng.integers(0, answers.vocabulary, (depths, width))
    ranks = rng.choice(3, size=len(truth), p=[0.7, 0.2, 0.1])
    for depth, (token, rank) in enumerate(zip(truth, ranks, strict=True)):
        candidates[depth] = np.where(candidates[depth] == token, (token + 1) % 7, candidates[depth])
        candidates[depth, rank] = token
    scores = np.log(np.broadcast_to(RANK_PROBABILITIES, (depths, width)))
    return most_probable_paths(candidates[None], scores[None], shape.nodes)[0]


def random_tree_around(
    truth: Sequence[int],
    size: int,
    vocabulary: int,
    rng: np.random.Generator,
    *,
    first: bool = False,
) -> TokenTree:
    """A random tree of ``size`` nodes with the path ``truth`` in it (as much of it as fits), anywhere or first."""
    truth = list(truth[:size])
    junk = size - len(truth)
    tokens: list[int] = []
    parents: list[int] = []
    on_path = ROOT
    planted = 0
    # Truth and junk arrive in random order, so the true path is anywhere in the layout.
    kinds = [True] * len(truth) + [False] * junk
    for is_truth in kinds if first else rng.permutation(kinds):
        if is_truth:
            tokens.append(truth[planted])
            parents.append(on_path)
            on_path = len(tokens) - 1
            planted += 1
        else:
            tokens.append(int(rng.integers(0, vocabulary)))
            parents.append(int(rng.integers(ROOT, len(tokens) - 1)))
    return TokenTree(np.array(tokens, dtype=np.int64), np.array(parents, dtype=np.int64))


def _rng_for(tokens: Tokens) -> np.random.Generator:
    return np.random.default_rng([len(tokens), *tokens[-4:].tolist()])
