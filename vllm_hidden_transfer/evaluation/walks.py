# SPDX-License-Identifier: Apache-2.0
"""Walk recorded answers with draft trees: what a decode pass would have accepted.

The recorded answer stands for what the target samples: a draft token is accepted where it equals
the answer's. For greedy answers that is exactly what the engine does, for sampled ones it has the
same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_hidden_transfer.drafting.bigram import BigramTables
from vllm_hidden_transfer.evaluation.drafts import Drafts
from vllm_hidden_transfer.tree import ROOT, TokenTree, most_probable_paths

_PLACES_AT_ONCE = 64


class Place(NamedTuple):
    """Where a decode pass starts."""

    answer: int
    """Which of the judged answers."""
    known: int
    """Its output tokens that are known, at least 1."""


class Drafter(Protocol):
    """Anything that drafts trees for a fixed list of judged answers."""

    @property
    def depths(self) -> int:
        """Length k of the longest path that it drafts."""
        ...

    def trees(
        self, places: Sequence[Place], budget: int, branching: int | None = None
    ) -> list[TokenTree]:
        """A tree of at most `budget` nodes for each place.

        `branching` limits the children of a node: 1 gives a chain.
        """
        ...


class OnePassDrafter:
    """Best-first trees of drafts that do not depend on the path: one pass knows them all."""

    def __init__(self, drafts: Sequence[Drafts], temperatures: Sequence[float]) -> None:
        self._tokens = [item.tokens.astype(np.int64) for item in drafts]
        self._log_probabilities = [item.log_probabilities(temperatures) for item in drafts]
        self.depths = len(temperatures)

    def trees(
        self, places: Sequence[Place], budget: int, branching: int | None = None
    ) -> list[TokenTree]:
        """One tree a place; see `Drafter`."""
        width = branching or budget
        tokens = [self._tokens[answer][known - 1, :, :width] for answer, known in places]
        scores = [self._log_probabilities[answer][known - 1, :, :width] for answer, known in places]
        return most_probable_paths(np.stack(tokens), np.stack(scores), budget)


class BigramDrafter:
    """Best-first trees of one-pass drafts that are re-weighted by the token before."""

    def __init__(
        self, marginals: Sequence[Drafts], tables: BigramTables, temperatures: Sequence[float]
    ) -> None:
        self._marginals, self._tables = marginals, tables
        self._temperatures = list(temperatures)
        self._totals = [
            np.stack([item.log_totals(depth, t) for depth, t in enumerate(temperatures)], axis=1)
            for item in marginals
        ]
        self.depths = len(temperatures)

    def trees(
        self, places: Sequence[Place], budget: int, branching: int | None = None
    ) -> list[TokenTree]:
        """One tree a place; see `Drafter`."""
        found: list[TokenTree] = []
        for start in range(0, len(places), _PLACES_AT_ONCE):
            tokens, scores = self._candidates(places[start : start + _PLACES_AT_ONCE])
            if branching:
                least = scores.topk(branching, dim=-1).values[..., -1:]
                scores = scores.masked_fill(scores < least, -torch.inf)
            found += most_probable_paths(tokens.numpy(), scores.double().numpy(), budget)
        return found

    def _candidates(self, places: Sequence[Place]) -> tuple[Tensor, Tensor]:
        """Tokens [b, k, width] and their log-probabilities after each of the depth before."""
        items = [(self._marginals[answer], known - 1) for answer, known in places]
        tokens = torch.from_numpy(np.stack([item.tokens[row] for item, row in items])).long()
        logits = torch.from_numpy(np.stack([item.logits[row] for item, row in items]))
        totals = np.stack([self._totals[answer][known - 1] for answer, known in places])
        scale = torch.tensor(self._temperatures)
        device = self._tables.before.device
        parts = (tokens, logits / scale[:, None], torch.from_numpy(totals).float(), scale)
        return tokens, self._tables.log_probabilities(*(part.to(device) for part in parts)).cpu()


@dataclass
class Walk:
    """The decode passes of one answer."""

    produced: list[int]
    """Output tokens of each pass."""
    accepted: list[int]
    """Depth of each pass's accepted path, as far as the answer goes."""

    @property
    def passes(self) -> int:
        """Number of decode passes."""
        return len(self.produced)

    @property
    def decoded(self) -> int:
        """Output tokens after the first."""
        return sum(self.produced)

    def split(self, tokens: int) -> tuple[Walk, Walk]:
        """The passes that start while fewer than `tokens` output tokens are known, and the others."""
        known = 1 + np.cumsum([0, *self.produced])[:-1]
        at = int((known < tokens).sum())
        return (
            Walk(self.produced[:at], self.accepted[:at]),
            Walk(self.produced[at:], self.accepted[at:]),
        )


def walk(
    answers: Sequence[Sequence[int]],
    drafter: Drafter,
    budget: int,
    branching: int | None = None,
) -> list[Walk]:
    """Walk all answers (their output tokens) side by side, a decode pass of each at a time.

    A pass yields the accepted path and one more token of the target. What would go beyond the last
    output token is dropped as the engine drops it: the request has ended there, by a stop token or by
    its length, and the pass counts all the same.
    """
    walks = [Walk([], []) for _ in answers]
    places = [Place(number, 1) for number, answer in enumerate(answers) if len(answer) > 1]
    while places:
        trees = drafter.trees(places, budget, branching)
        left = []
        for place, tree in zip(places, trees, strict=True):
            answer = answers[place.answer]
            accepted = accepted_depth(tree, answer[place.known :])
            produced = min(accepted + 1, len(answer) - place.known)
            walks[place.answer].produced.append(produced)
            walks[place.answer].accepted.append(accepted)
            if place.known + produced < len(answer):
                left.append(Place(place.answer, place.known + produced))
        places = left
    return walks


def accepted_depth(tree: TokenTree, tokens: Sequence[int]) -> int:
    """How many of the next tokens lie on a path of the tree."""
    node = ROOT
    for depth, token in enumerate(tokens):
        child = tree.child(node, token)
        if child is None:
            return depth
        node = child
    return len(tokens)
