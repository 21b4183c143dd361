# SPDX-License-Identifier: Apache-2.0
"""From draft logits to candidates with calibrated log-probabilities. Plain torch, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def candidates(
    logits: torch.Tensor, temperatures: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens of each depth under softmax(logits / temperature of the depth).

    Args:
        logits: [requests, depths, vocabulary], any float dtype.
        temperatures: float32 [depths] on the same device, the calibration.
        width: candidates to keep at each depth.

    Returns:
        Tokens int64 and log-probabilities float64, both [requests, depths, width], best first. A row with a NaN or
        an infinite logit on top gives NaN log-probabilities, which the tree builders leave out.
    """
    scaled = logits.float() / temperatures[None, :, None]
    best, tokens = scaled.topk(min(width, scaled.shape[-1]), dim=-1)
    return tokens, (best - scaled.logsumexp(dim=-1, keepdim=True)).double()


def top_candidates(
    logits: torch.Tensor, temperatures: Sequence[float], width: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """``candidates`` on the host."""
    scale = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
    tokens, log_probabilities = candidates(logits, scale, width)
    return tokens.cpu().numpy(), log_probabilities.cpu().numpy()
