# SPDX-License-Identifier: Apache-2.0
"""What a drafter is told of a step under the V2 runner: tensors by request slot. Plain torch, no vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SlotBatch:
    """The requests of a step, right after it was verified; some are in the middle of their prompts. b requests."""

    slots: torch.Tensor
    """int64 [b]: request slots."""
    sampled: torch.Tensor
    """int64 [b]: the token just sampled, the root of the tree to come; anything within a prompt."""
    roots: torch.Tensor
    """int64 [b]: its position."""
    num_sampled: torch.Tensor
    """int32 [b]: tokens that the step gave; 0 within a prompt."""
    hidden: torch.Tensor | None
    """[b, hidden_size]: the hidden state that entered the transfer layer at the token before the root."""
    request_ids: list[str]
    budget: int
    """Nodes of every tree, dead ones included."""
