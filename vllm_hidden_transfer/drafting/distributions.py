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


def candidates(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    width: int,
    bigram: BigramTables | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens of each depth under softmax(logits / temperature of the depth).

    Args:
        logits: [requests, depths, vocabulary], any float dtype.
        temperatures: float32 [depths] on the same device, the calibration.
        width: candidates to keep at each depth.
        bigram: re-weights the candidates of a depth by each candidate of the depth before.

    Returns:
        Tokens int64 [requests, depths, width], the most probable of each depth first, and their log-probabilities:
        float64 of the same shape, or [requests, depths, width, width] where a bigram re-weighting was given, the
        candidate before first. A row with a NaN or an infinite logit on top gives NaN log-probabilities, which the
        tree builders leave out.
    """
    if bigram is not None:
        width = max(width, BIGRAM_WIDTH)
    scaled = logits.float() / temperatures[None, :, None]
    best, tokens = scaled.topk(min(width, scaled.shape[-1]), dim=-1)
    total = scaled.logsumexp(dim=-1)
    if bigram is None:
        return tokens, (best - total[:, :, None]).double()
    return tokens, bigram.log_probabilities(tokens, best, total, temperatures).double()


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
