# SPDX-License-Identifier: Apache-2.0
"""From draft logits to candidates with calibrated log-probabilities. Plain torch, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_hidden_transfer.drafting.bigram import BigramTables

BIGRAM_WIDTH = 64
"""Candidates of each depth that are re-weighted at least: a token that many trees would leave out may follow well."""

_REQUESTS_AT_ONCE = 16
"""Whose logits are scaled at a time: fp32 copies of whole vocabularies would be the most memory of a draft pass."""


@dataclass(frozen=True)
class DraftCandidates:
    """The most probable tokens of each depth, and what they are worth; see ``tree.Candidates``.

    A row with a NaN or an infinite logit on top gives NaN log-probabilities, which the tree builder leaves out.
    """

    tokens: torch.Tensor
    """int64 [b, depths, width], the most probable of each depth first."""
    logits: torch.Tensor
    """float32 of the same shape, divided by the temperature of the depth."""
    totals: torch.Tensor
    """float32 [b, depths]: log of the sum of exp(logit / temperature) over the whole vocabulary."""
    temperatures: torch.Tensor
    """float32 [depths], the calibration."""
    bigram: BigramTables | None = None
    """Re-weights the candidates of a depth by the token at the depth before."""

    @property
    def broken(self) -> torch.Tensor:
        """bool [b, depths]: rows whose logits were NaN or infinite."""
        return (self.logits[..., 0] - self.totals).isnan()

    def without(self, rows: torch.Tensor) -> DraftCandidates:
        """The same without the candidates of some rows, bool [b, depths]."""
        return replace(self, logits=self.logits.masked_fill(rows[:, :, None], -torch.inf))

    def after(self, depth: int, before: torch.Tensor) -> torch.Tensor:
        """See ``tree.Candidates.after``."""
        logits = self.logits[:, depth]
        if self.bigram is None or depth == 0:
            alone = logits - self.totals[:, depth, None]
            return alone[:, None].expand(-1, before.shape[1], -1)
        gain = self.bigram.gain(depth, before, self.tokens[:, depth]) / self.temperatures[depth]
        pairs = logits[:, None] + gain
        total = torch.logaddexp(pairs.logsumexp(-1), self._others[:, depth, None])
        return pairs - total[:, :, None]

    @cached_property
    def _others(self) -> torch.Tensor:
        """float32 [b, depths]: log of the sum of exp(logit / temperature) over tokens that are no candidates: they
        count as if they gained nothing."""
        covered = (self.logits.logsumexp(-1) - self.totals).exp()
        return self.totals + (1 - covered).clamp_min(1e-9).log()


def candidates(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    width: int,
    bigram: BigramTables | None = None,
    columns: torch.Tensor | None = None,
) -> DraftCandidates:
    """The most probable tokens of each depth under softmax(logits / temperature of the depth).

    Args:
        logits: [b, depths, vocabulary], any float dtype.
        temperatures: float32 [depths] on the same device, the calibration.
        width: candidates to keep at each depth.
        bigram: re-weights the candidates of a depth by the token at the depth before.
        columns: int64 [b, vocabulary], the token that each logit is of; None where that is its place. A logit of no
            token is -inf.
    """
    if bigram is not None:
        width = max(width, BIGRAM_WIDTH)
    width = min(width, logits.shape[-1])
    parts = [_best(rows, temperatures, width) for rows in logits.split(_REQUESTS_AT_ONCE)]
    tokens, best, totals = (torch.cat(part) for part in zip(*parts, strict=True))
    if columns is not None:
        tokens = columns.gather(1, tokens.flatten(1)).view_as(tokens)
    return DraftCandidates(tokens, best, totals, temperatures, bigram)


def _best(
    logits: torch.Tensor, temperatures: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best tokens [b, depths, width], their scaled logits, and the log of all exponentials' sum [b, depths]."""
    scaled = logits / temperatures[:, None]  # float32, whatever the logits are
    best, tokens = scaled.topk(width, dim=-1)
    return tokens, best, scaled.logsumexp(dim=-1)


def top_candidates(
    logits: torch.Tensor,
    temperatures: Sequence[float],
    width: int,
    bigram: BigramTables | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """``candidates`` on the host, all of them.

    Returns:
        Tokens int64 [b, depths, width] and log-probabilities float64 of the same shape, or [b, depths, width, width]
        where a bigram re-weighting was given, the candidate before first.
    """
    scale = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
    found = candidates(logits, scale, width, bigram)
    befores = [found.tokens[:, max(depth - 1, 0)] for depth in range(found.tokens.shape[1])]
    scores = torch.stack([found.after(*each) for each in enumerate(befores)], dim=1)
    if bigram is None:
        scores = scores[:, :, 0]
    return found.tokens.cpu().numpy(), scores.cpu().numpy()
