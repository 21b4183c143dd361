# SPDX-License-Identifier: Apache-2.0
"""A draft source whose draft pass goes wrong on purpose."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from vllm_hidden_transfer.drafting.source import DraftBatch
from vllm_hidden_transfer.engine.cpu import TreeCPUModelRunner
from vllm_hidden_transfer.engine.v1.transfer_source import TransferSource

CHECKPOINT_VARIABLE = "VLLM_HIDDEN_TRANSFER_TEST_CHECKPOINT"


class PoisonedSource(TransferSource):
    """Real drafts, but every other request's pseudo hidden states are NaN or infinite."""

    latest: PoisonedSource

    def __init__(self, runner: TreeCPUModelRunner) -> None:
        super().__init__(runner, os.environ[CHECKPOINT_VARIABLE])
        PoisonedSource.latest = self

    def draft_logits(self, batch: DraftBatch, columns: torch.Tensor | None) -> torch.Tensor:
        assert batch.hidden is not None
        hidden = batch.hidden.clone()
        hidden[::2] = float("nan")
        hidden[::4] = float("inf")
        return super().draft_logits(replace(batch, hidden=hidden), columns)
