# SPDX-License-Identifier: Apache-2.0
"""Drafts without maps: what stood in the text before, and what the target last held likely after a token.

Both sources (``lookup``, ``recycling``) are looked up, so a draft costs no pass through the target and needs no
checkpoint. How far each is trusted is learned from the texts themselves: whatever a copy proposed is compared with the
tokens that came, drafted or not. numpy, no vLLM.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_hidden_transfer.drafting.frequencies import Frequencies
from vllm_hidden_transfer.drafting.lookup import look_up
from vllm_hidden_transfer.drafting.recycling import Successors
from vllm_hidden_transfer.tree import TokenTree, best_first, in_runs

LEAST = 0.02
"""Paths that are less probable than this are not worth the time to look further."""

_PRIOR: NDArray[np.float64] = np.array(
    [
        [0.15, 0.45, 0.55, 0.65, 0.75, 0.78, 0.80, 0.82],
        [0.30, 0.55, 0.65, 0.70, 0.75, 0.80, 0.80, 0.84],
        [0.45, 0.65, 0.72, 0.78, 0.83, 0.85, 0.85, 0.88],
        [0.70, 0.82, 0.86, 0.88, 0.91, 0.92, 0.92, 0.93],
    ]
)
"""[LONGEST_MATCH, DEEPEST_COPY] of ``lookup``: how often a copy is right, before anything is known of these texts."""

_NO_TREE = TokenTree.chain([])

_Place = tuple[int, int]
"""A token, and how many of the copy led to it; ``_OFF`` where it is not on the copy."""
_OFF = -1


@dataclass(frozen=True)
class _Proposed:
    """What was copied for a request when it had so many tokens."""

    length: int
    match: int
    copy: list[int]


class TextDrafts:
    """Trees from the text.

    Args:
        sources: which of "lookup" and "recycling" to draft with.
        vocabulary: number of token ids.
    """

    def __init__(self, sources: Collection[str], vocabulary: int) -> None:
        self.successors = Successors(vocabulary) if "recycling" in sources else None
        self._copies = "lookup" in sources
        self._trust = Frequencies(_PRIOR)
        self._proposed: dict[str, _Proposed] = {}

    def propose(
        self,
        request_ids: Sequence[str],
        contexts: Sequence[NDArray[np.integer]],
        budget: int,
        least: float = LEAST,
    ) -> list[TokenTree]:
        """A tree of at most ``budget`` nodes for each request, in runs; empty where nothing is worth drafting.

        Args:
            request_ids: of b requests.
            contexts: each request's tokens so far, the one just sampled included.
            budget: nodes of a tree at most.
            least: probability of the paths that are worth drafting; the less is asked for, the longer it takes.
        """
        found = look_up(contexts) if self._copies else None
        trees = []
        for row, (request_id, context) in enumerate(zip(request_ids, contexts, strict=True)):
            before = self._proposed.get(request_id)
            if before is None and self.successors is not None:
                self.successors.warm(context)
            copy, trust = [], []
            if found is not None and found.matches[row]:
                copy = found.tokens[row].tolist()
                trust = self._trust.values[found.matches[row] - 1].tolist()
            if before is None or self._is_settled(before, context):
                match = 0 if found is None else int(found.matches[row])
                self._proposed[request_id] = _Proposed(len(context), match, copy)
            trees.append(self._tree(int(context[-1]), copy, trust, budget, max(least, LEAST)))
        return trees

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._proposed.pop(request_id, None)

    def _is_settled(self, before: _Proposed, context: NDArray[np.integer]) -> bool:
        """Whether it is known how far a copy was right, which then is learned. Until then no other is looked at, or one
        that comes true token by token would teach its first depth only."""
        came = context[before.length : before.length + len(before.copy)].tolist()
        if len(context) < before.length:  # a session whose text was cut back
            return True
        right = [copied == token for copied, token in zip(before.copy, came, strict=False)]
        if all(right) and len(came) < len(before.copy):
            return False
        if right:
            told = right.index(False) + 1 if False in right else len(right)
            cells = np.full(told, before.match - 1), np.arange(told)
            self._trust.observe(cells, right[:told])
        return True

    def _tree(
        self, root: int, copy: list[int], trust: list[float], budget: int, least: float
    ) -> TokenTree:
        successors = self.successors

        def children(place: _Place) -> list[tuple[int, float, _Place]]:
            token, depth = place
            others = [] if successors is None else successors.after(token)
            if depth == _OFF or depth >= len(copy):
                return [(other, share, (other, _OFF)) for other, share in others]
            copied, trusted = copy[depth], trust[depth]
            shares = {other: (1 - trusted) * share for other, share in others}
            shares[copied] = trusted + shares.get(copied, 0.0)
            return [
                (other, share, (other, depth + 1 if other == copied else _OFF))
                for other, share in shares.items()
            ]

        start = 0 if copy else _OFF
        if all(share <= least for _, share, _ in children((root, start))):
            return _NO_TREE  # most of a large batch, and quickly said
        return in_runs(best_first((root, start), children, budget, least))
