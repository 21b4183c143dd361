# SPDX-License-Identifier: Apache-2.0
"""Medusa heads with the target's own LM head (Medusa-1, arXiv 2401.10774, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.rivals.states import FinalStates
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import Prefixes
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.training.objective import (
    Drafted,
    DraftingModel,
    TaughtRows,
    taught_rows,
)


class MedusaHeads(nn.Module):
    """Head i = 1..k: h + SiLU(W_i h + b_i), h the final state of the last processed token.

    W and b start at zero, where every head says what the target says of the next token. Head i drafts the token
    at root + 1 + i, and as published it does not know the one at root + 1, which has just been sampled.
    """

    def __init__(self, steps: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(steps, size, size))
        self.bias = nn.Parameter(torch.zeros(steps, size))

    def forward(self, final: Tensor) -> Tensor:
        """States [..., k, d] for the LM head from final states [..., d], both after the last norm."""
        moved = (final @ self.weight.flatten(0, 1).T).unflatten(-1, self.bias.shape) + self.bias
        return final[..., None, :] + nn.functional.silu(moved)


@dataclass(frozen=True)
class MedusaRows(TaughtRows):
    """Rows of Medusa heads."""

    final: Tensor
    """fp32 [b, r, d]: the target's state at each root after the last norm."""


class MedusaInTraining(DraftingModel[MedusaRows]):
    """Medusa heads among the trainer's drafters."""

    def __init__(
        self, target: FrozenTarget, cache: Prefixes, states: FinalStates, heads: MedusaHeads
    ) -> None:
        super().__init__(target, cache, heads, len(heads.weight))
        self._states = states

    @property
    def identity(self) -> dict[str, str]:
        """There is one form of them."""
        return {"drafter": "medusa"}

    @torch.no_grad()
    def rows(self, examples: list[Example], roots: list[list[int]]) -> MedusaRows:
        """Rows with the final states at their roots."""
        target = self.target
        after = torch.stack(
            [self._states.read("after", e)[of_e] for e, of_e in zip(examples, roots, strict=True)]
        )
        final = target.model.model.norm(after.to(target.device, target.dtype))
        taught = taught_rows(self.cache, examples, roots, self.steps, target.device)
        return MedusaRows(**vars(taught), final=final.float())

    def draft(self, rows: MedusaRows) -> Drafted:
        """All heads at once: none waits for another."""
        return Drafted(self.module(rows.final).to(self.target.dtype))
