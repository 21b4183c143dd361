# SPDX-License-Identifier: Apache-2.0
"""Where drafts come from: the interface that every draft source fills."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_hidden_transfer.tree import TokenTree


@dataclass(frozen=True)
class DraftBatch:
    """The requests that want a tree, right after a verification step. b requests."""

    request_ids: Sequence[str]
    batch_rows: NDArray[np.int64]
    """int64 [b]: each request's row in the runner's batch."""
    token_ids: Sequence[NDArray[np.int32]]
    """Each request's tokens so far, the one just sampled (the root of the tree to come) included."""
    hidden: torch.Tensor | None
    """[b, hidden_size]: the hidden state that entered the transfer layer at the token before the root."""
    budget: int
    """Nodes in a tree at most."""
    least: float = 0.0
    """Paths that are not more probable than this will not be verified: a source may leave them out."""

    def of(self, places: Sequence[int]) -> DraftBatch:
        """The batch of some of the requests, by their place in this one."""
        return replace(
            self,
            request_ids=[self.request_ids[place] for place in places],
            batch_rows=self.batch_rows[list(places)],
            token_ids=[self.token_ids[place] for place in places],
            hidden=None if self.hidden is None else self.hidden[list(places)],
        )


class DraftSource(ABC):
    """Proposes one token tree for each request of a batch."""

    transfer_layer: int | None = None
    """The layer whose incoming hidden state the source needs, None where it needs none."""
    runs_a_pass: bool = True
    """Whether a proposal costs a pass through the target. One that does not is the same as a look-up."""
    reads_logits: bool = False
    """Whether it wants to see what the target computes (``observe_logits``)."""

    @abstractmethod
    def on_target_loaded(self, model: Any) -> None:
        """Called once, when vLLM has loaded the target (its ``...ForCausalLM``)."""

    @abstractmethod
    def propose(self, batch: DraftBatch) -> list[TokenTree]:
        """One tree for each request, possibly empty, with at most ``batch.budget`` nodes."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for the banner at start."""

    def look_up(self, batch: DraftBatch) -> list[TokenTree] | None:
        """Trees that cost no pass, for steps in which one would not pay; None where the source has none."""
        return None

    def observe_logits(  # noqa: B027
        self, tokens: NDArray[np.integer], logits: torch.Tensor
    ) -> None:
        """The target's logits [n, vocabulary] of a step, before any sampling parameter, and the tokens [n] whose rows
        they are."""

    def forget(self, request_id: str) -> None:  # noqa: B027
        """A request has ended."""
