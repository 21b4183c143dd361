# SPDX-License-Identifier: Apache-2.0
"""Penalties that count a row's own path, with vLLM's own kernel.

Stock counts the draft tokens before a row as if they were a chain (``PenaltiesState.apply``,
vllm/v1/worker/gpu/sample/penalties.py). Here every row of a tree is handed to the same kernel as a request of its own,
whose output so far ends with the row's path: the arithmetic is that of decoding without speculation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState, apply_penalties

from vllm_hidden_transfer.tree import tensors


@dataclass(frozen=True)
class RowsOfTrees:
    """Which row of logits is which row of which tree. r rows of b requests with K nodes each."""

    request: torch.Tensor
    """int64 [r]: the row's request in the batch."""
    row: torch.Tensor
    """int64 [r]: its row in the request's tree, 0 for the root."""
    tokens: torch.Tensor
    """int64 [b, K]: draft tokens, negative where there is none."""
    parents: torch.Tensor
    """int64 [b, K]."""


class PathPenalties(LogitsProcessor):
    """Stock's penalties, on trees while ``rows`` is set."""

    def __init__(self, stock: PenaltiesState) -> None:
        self._stock = stock
        self.rows: RowsOfTrees | None = None

    def add_request(self, req_idx: int, sampling_params: object) -> bool:
        added: bool = self._stock.add_request(req_idx, sampling_params)
        return added

    def apply_staged_writes(self) -> None:
        self._stock.apply_staged_writes()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        stock, rows = self._stock, self.rows
        if rows is None or not np.any(stock.use_penalty[ctx.idx_mapping_np]):
            applied: torch.Tensor = stock.apply(logits, ctx)
            return applied
        reach = torch.nn.functional.pad(tensors.ancestors(rows.parents), (0, 0, 1, 0))
        on_path = reach[rows.request, rows.row] & (rows.tokens >= 0)[rows.request]
        slots = ctx.expanded_idx_mapping
        counts = stock.output_bin_counts[slots]
        counts.scatter_add_(1, rows.tokens.clamp(min=0)[rows.request], on_path.to(counts.dtype))
        each = torch.arange(len(logits), device=logits.device)
        apply_penalties(
            logits,
            each,
            ctx.input_ids,
            torch.zeros_like(ctx.expanded_local_pos),
            stock.repetition_penalty.gpu[slots],
            stock.frequency_penalty.gpu[slots],
            stock.presence_penalty.gpu[slots],
            stock.prompt_bin_mask[slots],
            counts,
        )
        return logits
