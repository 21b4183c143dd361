# SPDX-License-Identifier: Apache-2.0
"""Bigram re-weighting of one-pass drafts: each candidate's probability after a token of the depth before.

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

    def gain(self, depth: int, before: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What logits of a depth gain by the token before, float32 [b, m, width].

        Args:
            depth: of the tokens, 1 to k - 1; the root's children are depth 0 and gain nothing.
            before: int64 [b, m], tokens at the depth before.
            tokens: int64 [b, width].
        """
        first, following = self.before[before, depth - 1], self.after[tokens, depth - 1]
        return first.float() @ following.float().mT
