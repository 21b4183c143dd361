# SPDX-License-Identifier: Apache-2.0
"""Bigram re-weighting of one-pass drafts: each candidate's probability after each candidate of the depth before.

Every depth of a one-pass draft is a marginal distribution: it does not know what is drafted before it. A low-rank
score of pairs (``transfer.BigramMaps``) makes it a conditional one for the price of two table rows a candidate. Plain
torch, no vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_hidden_transfer.checkpoint.maps import BigramMaps

_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class BigramTables:
    """Every token's two vectors at the depths 2..k: their inner product is what a logit gains."""

    before: torch.Tensor
    """[vocabulary, k - 1, rank]: as the token that is drafted at the depth before."""
    after: torch.Tensor
    """[vocabulary, k - 1, rank]: as the token that follows."""

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        maps: BigramMaps,
        vocabulary: int,
        embed: Callable[[torch.Tensor], torch.Tensor],
        head: Callable[[torch.Tensor], torch.Tensor],
    ) -> BigramTables:
        """Run the whole vocabulary through the maps, once.

        Args:
            maps: on the target's device.
            vocabulary: number of token ids.
            embed: the target's input embeddings [n, d] of token ids int64 [n].
            head: the LM head's weight rows [n, d] of token ids.

        Returns:
            Tables in the dtype that ``embed`` returns.
        """
        before, after = [], []
        down, up = maps.down.float(), maps.up.float()
        for start in range(0, vocabulary, _ROWS_AT_ONCE):
            ids = torch.arange(start, min(start + _ROWS_AT_ONCE, vocabulary), device=down.device)
            rows = embed(ids)
            before.append(torch.einsum("nd,jrd->njr", rows.float(), down).to(rows.dtype))
            after.append(torch.einsum("nd,jdr->njr", head(ids).float(), up).to(rows.dtype))
        return cls(torch.cat(before), torch.cat(after))

    def log_probabilities(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        totals: torch.Tensor,
        temperatures: torch.Tensor,
    ) -> torch.Tensor:
        """log p(candidate | candidate before it), normalised as if tokens that are no candidates gained nothing.

        Args:
            tokens: int64 [b, k, width], candidates of each depth.
            logits: float32 of the same shape, divided by the temperature.
            totals: [b, k], log of the sum of exp(logit) over the whole vocabulary.
            temperatures: [k].

        Returns:
            float32 [b, k, width before, width]; the first depth has nothing before it: all its rows are equal.
        """
        width = tokens.shape[-1]
        places = torch.arange(tokens.shape[1] - 1, device=tokens.device)[:, None]
        before = self.before[tokens[:, :-1], places].float()
        after = self.after[tokens[:, 1:], places].float()
        gain = before @ after.transpose(-1, -2) / temperatures[1:, None, None]
        pairs = logits[:, 1:, None, :] + gain
        covered = (logits[:, 1:].logsumexp(-1) - totals[:, 1:]).exp()
        rest = totals[:, 1:] + (1 - covered).clamp_min(1e-9).log()
        total = torch.logaddexp(pairs.logsumexp(-1), rest[:, :, None])
        first = (logits[:, :1] - totals[:, :1, None])[:, :, None, :].expand(-1, -1, width, -1)
        return torch.cat([first, pairs - total[..., None]], dim=1)
