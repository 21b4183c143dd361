# SPDX-License-Identifier: Apache-2.0
"""Drafts from the text under the V1 runner (``drafting.text``): no maps, no pass through the target."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_hidden_transfer.drafting.recycling import MOST_ROWS, WIDTH, best_guesses
from vllm_hidden_transfer.drafting.source import DraftBatch, DraftSource
from vllm_hidden_transfer.drafting.text import TextDrafts
from vllm_hidden_transfer.tree import TokenTree

NAMES = {"lookup": "prompt lookup", "recycling": "token recycling"}


class TextSource(DraftSource):
    """Drafts from what stands in the texts.

    Args:
        sources: which of "lookup" and "recycling".
        vocabulary: number of token ids.
    """

    runs_a_pass = False

    def __init__(self, sources: Collection[str], vocabulary: int) -> None:
        self._drafts = TextDrafts(sources, vocabulary)
        self.reads_logits = self._drafts.successors is not None
        self._about = " and ".join(NAMES[source] for source in NAMES if source in sources)

    def on_target_loaded(self, model: Any) -> None:
        """It needs nothing of the target."""

    def describe(self) -> str:
        return f"drafts of {self._about}, without maps"

    def propose(self, batch: DraftBatch) -> list[TokenTree]:
        return self.look_up(batch)

    def look_up(self, batch: DraftBatch) -> list[TokenTree]:
        return self._drafts.propose(batch.request_ids, batch.token_ids, batch.budget, batch.least)

    def observe_logits(self, tokens: NDArray[np.integer], logits: torch.Tensor) -> None:
        successors = self._drafts.successors
        if successors is None or logits.shape[-1] < WIDTH:
            return
        if len(tokens) > MOST_ROWS:
            rows = np.linspace(0, len(tokens) - 1, MOST_ROWS).astype(np.int64)
            tokens, logits = tokens[rows], logits[torch.from_numpy(rows)]
        guesses, probabilities = best_guesses(logits)
        successors.learn(tokens, guesses.numpy(), probabilities.numpy())

    def forget(self, request_id: str) -> None:
        self._drafts.forget(request_id)
