# SPDX-License-Identifier: Apache-2.0
"""From draft logits to candidates with calibrated log-probabilities. Plain torch, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_hidden_transfer.drafting.bigram import BigramTables

BIGRAM_WIDTH = 64
"""Candidates of each depth that are re-weighted at least: a token that many trees would leave out may follow well."""

_REQUESTS_AT_ONCE = 16
"""Whose logits are scaled at a time: fp32 copies of whole vocabularies would be the most memory of a draft pass."""


def candidates(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    width: int,
    bigram: BigramTables | None = None,
    columns: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens of each depth under softmax(logits / temperature of the depth).

    Args:
        logits: [requests, depths, vocabulary], any float dtype.
        temperatures: float32 [depths] on the same device, the calibration.
        width: candidates to keep at each depth.
        bigram: re-weights the candidates of a depth by each candidate of the depth before.
        columns: int64 [requests, vocabulary], the token that each logit is of; None where that is its place. A logit of
            no token is -inf.

    Returns:
        Tokens int64 [requests, depths, width], the most probable of each depth first, and their log-probabilities:
        float64 of the same shape, or [requests, depths, width, width] where a bigram re-weighting was given, the
        candidate before first. A row with a NaN or an infinite logit on top gives NaN log-probabilities, which the
        tree builders leave out.
    """
    if bigram is not None:
        width = max(width, BIGRAM_WIDTH)
    width = min(width, logits.shape[-1])
    parts = [_best(rows, temperatures, width) for rows in logits.split(_REQUESTS_AT_ONCE)]
    tokens, best, total = (torch.cat(part) for part in zip(*parts, strict=True))
    if columns is not None:
        tokens = columns.gather(1, tokens.flatten(1)).view_as(tokens)
    if bigram is None:
        return tokens, (best - total[:, :, None]).double()
    return tokens, bigram.log_probabilities(tokens, best, total, temperatures).double()


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
    """``candidates`` on the host."""
    scale = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
    tokens, log_probabilities = candidates(logits, scale, width, bigram)
    return tokens.cpu().numpy(), log_probabilities.cpu().numpy()
