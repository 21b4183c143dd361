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
from vllm_hidden_transfer.drafting.distributions import DraftCandidates
from vllm_hidden_transfer.drafting.lookup import look_up, mixed_in
from vllm_hidden_transfer.evaluation.drafts import Drafts, FloatArray, JudgedAnswer
from vllm_hidden_transfer.tree import (
    ROOT,
    Candidates,
    CopiedPaths,
    GivenCandidates,
    TokenTree,
    most_probable,
    path_major,
)

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


def copied_paths(
    answers: Sequence[JudgedAnswer], places: Sequence[Place], shares: FloatArray | None
) -> CopiedPaths | None:
    """What prompt lookup proposes at some places, None without shares (see ``drafting/lookup.py``)."""
    if shares is None:
        return None
    texts = [(answers[place.answer], place.known) for place in places]
    contexts = [answer.example.tokens[: answer.first + known] for answer, known in texts]
    return mixed_in(look_up([np.array(context) for context in contexts]), shares)


class OnePassDrafter:
    """Best-first trees of drafts that do not depend on the path: one pass knows them all.

    With `shares` (see ``drafting/lookup.py``) copies are mixed in, but not where `branching` is limited.
    """

    def __init__(
        self,
        drafts: Sequence[Drafts],
        temperatures: Sequence[float],
        shares: FloatArray | None = None,
    ) -> None:
        self._tokens = [item.tokens.astype(np.int64) for item in drafts]
        self._log_probabilities = [item.log_probabilities(temperatures) for item in drafts]
        self._answers = [item.answer for item in drafts]
        self._shares = shares
        self.depths = len(temperatures)

    def trees(
        self, places: Sequence[Place], budget: int, branching: int | None = None
    ) -> list[TokenTree]:
        """One tree a place; see `Drafter`."""
        width = branching or budget
        tokens = [self._tokens[answer][known - 1, :, :width] for answer, known in places]
        scores = [self._log_probabilities[answer][known - 1, :, :width] for answer, known in places]
        given = GivenCandidates(
            torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(scores))
        )
        shares = None if branching else self._shares
        copied = copied_paths(self._answers, places, shares)
        return path_major(most_probable(given, budget, copied)).on_host()


class BigramDrafter:
    """Best-first trees of one-pass drafts that are re-weighted by the token before; `shares` as above."""

    def __init__(
        self,
        marginals: Sequence[Drafts],
        tables: BigramTables,
        temperatures: Sequence[float],
        shares: FloatArray | None = None,
    ) -> None:
        self._marginals, self._tables, self._shares = marginals, tables, shares
        self._answers = [item.answer for item in marginals]
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
            some = places[start : start + _PLACES_AT_ONCE]
            candidates: Candidates = self.candidates(some)
            if branching:
                candidates = _Best(candidates, branching)
            copied = copied_paths(self._answers, some, None if branching else self._shares)
            found += path_major(most_probable(candidates, budget, copied)).on_host()
        return found

    def candidates(self, places: Sequence[Place]) -> DraftCandidates:
        """What the maps say at some places."""
        items = [(self._marginals[answer], known - 1) for answer, known in places]
        tokens = torch.from_numpy(np.stack([item.tokens[row] for item, row in items])).long()
        logits = torch.from_numpy(np.stack([item.logits[row] for item, row in items]))
        totals = np.stack([self._totals[answer][known - 1] for answer, known in places])
        scale = torch.tensor(self._temperatures)
        device = self._tables.before.device
        return DraftCandidates(
            tokens.to(device),
            (logits / scale[:, None]).to(device),
            torch.from_numpy(totals).float().to(device),
            scale.to(device),
            self._tables,
        )


@dataclass(frozen=True)
class _Best:
    """Candidates of which only the best few may follow a token."""

    candidates: Candidates
    branching: int

    @property
    def tokens(self) -> Tensor:
        return self.candidates.tokens

    def after(self, depth: int, before: Tensor) -> Tensor:
        scores = self.candidates.after(depth, before)
        least = scores.topk(self.branching, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, -torch.inf)


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
