# SPDX-License-Identifier: Apache-2.0
"""The verification walk: sample at the root, follow the sampled token while the tree has it.

Each visited node's token is drawn from the target's own processed distribution, so the output is distributed exactly
as without speculation for any tree that does not look at the target's random numbers, and one draw per visited node
in the order of depth consumes a seeded request's random stream exactly as decoding without speculation does.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_hidden_transfer.tree.token_tree import ROOT, TokenTree


class VerificationWalk:
    """The walks of a batch of requests, side by side, one depth at a time.

    ``while walk.active:`` sample one token for every request in ``active`` at its ``node``, then ``advance``.
    A request without a tree (None) takes part in the first depth only.
    """

    def __init__(self, trees: Sequence[TokenTree | None]) -> None:
        self._trees = trees
        self.nodes: list[int] = [ROOT] * len(trees)
        """The last visited node of every request."""
        self.tokens: list[list[int]] = [[] for _ in trees]
        """The sampled tokens of every request: the accepted path and the bonus token."""
        self.active: list[int] = list(range(len(trees)))
        """The requests that sample at the present depth, ascending."""

    @property
    def depth(self) -> int:
        """Number of tokens that every active request has accepted so far."""
        return len(self.tokens[self.active[0]]) if self.active else 0

    def advance(self, sampled: Sequence[int]) -> None:
        """Take the tokens sampled at the present depth, one for each active request, in their order."""
        still_walking = []
        for request, token in zip(self.active, sampled, strict=True):
            self.tokens[request].append(token)
            tree = self._trees[request]
            child = tree.child(self.nodes[request], token) if tree is not None else None
            if child is not None:
                self.nodes[request] = child
                still_walking.append(request)
        self.active = still_walking
