# SPDX-License-Identifier: Apache-2.0
"""What a tree is built of: the tokens that may stand at each depth, and paths that another source proposes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

NO_TOKEN = -1
"""Where a row of token ids has none."""


class Candidates(Protocol):
    """Draft distributions of b requests at some depths, over ``width`` tokens each."""

    @property
    def tokens(self) -> torch.Tensor:
        """int64 [b, depths, width]: the tokens, distinct within a depth."""
        ...

    def after(self, depth: int, before: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of a depth's tokens after each of some tokens at the depth before.

        Args:
            depth: 0 for the children of the root.
            before: int64 [b, m]; the root's token is not known here, so at depth 0 they mean nothing.

        Returns:
            [b, m, width] in any float dtype; -inf or NaN for what must not enter a tree.
        """
        ...


@dataclass(frozen=True)
class GivenCandidates:
    """Candidates whose log-probabilities are all known."""

    tokens: torch.Tensor
    """int64 [b, depths, width]."""
    log_probabilities: torch.Tensor
    """float64 of the same shape, or [b, depths, width, width]: after each candidate of the depth before."""

    def after(self, depth: int, before: torch.Tensor) -> torch.Tensor:
        """See ``Candidates``."""
        scores = self.log_probabilities[:, depth]
        if scores.dim() == 2:
            return scores[:, None].expand(-1, before.shape[1], -1)
        if depth == 0:
            return scores[:, :1].expand(-1, before.shape[1], -1)
        found = self.tokens[:, depth - 1, None] == before[:, :, None]
        rows = found.float().argmax(-1)[:, :, None].expand(-1, -1, scores.shape[2])
        return scores.gather(1, rows)


@dataclass(frozen=True)
class CopiedPaths:
    """One path of each request that does not come from the draft distributions, and how far it is trusted.

    A node's children on such a path have the probabilities of a mixture: ``share`` of what the path says, the rest of
    what the candidates say. Below the last depth of the candidates the path stands alone.
    """

    tokens: torch.Tensor
    """int64 [b, depths]: the path from the root; ``NO_TOKEN`` behind its end."""
    shares: torch.Tensor
    """float64 of the same shape, 0 to 1: probability that it is right here if it was so far; 0 behind its end."""
