# SPDX-License-Identifier: Apache-2.0
"""Tree verification in place of V2's chain rejection sampler, without waiting for the device.

Every row is sampled with vLLM's own sampler at its depth's position, exactly as decoding without speculation samples
there (V2's noise is a hash of seed, position and token); then the walk follows what was drawn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_hidden_transfer.engine.v2.penalties import PathPenalties, RowsOfTrees
from vllm_hidden_transfer.engine.v2.slots import TreeSlots
from vllm_hidden_transfer.tree import TensorWalk, TreeTensors, tensors

if TYPE_CHECKING:
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.sample.output import SamplerOutput
    from vllm.v1.worker.gpu.sample.sampler import Sampler


class TreeVerifier(RejectionSampler):
    """vLLM's rejection sampler with a walk in place of the rejection test; chunks, counters and logprobs are its own.

    Args:
        sampler: vLLM's sampler, whose penalties learn to count paths.
        spec_config: vLLM's speculative configuration.
        device: where the trees are.
        slots: the trees that await verification.
    """

    def __init__(
        self, sampler: Sampler, spec_config: Any, device: torch.device, slots: TreeSlots
    ) -> None:
        super().__init__(sampler, spec_config, device)
        self._slots = slots
        self._rows = torch.arange(slots.num_nodes + 1, device=device)
        self._penalties = PathPenalties(sampler.penalties_state)
        place = sampler.logits_processors.index(sampler.penalties_state)
        sampler.logits_processors[place] = self._penalties
        self._chunks: list[TensorWalk] = []
        self._path_order = self._rows

    def forget(self) -> None:
        """A new step begins."""
        self._chunks = []

    @property
    def walk(self) -> TensorWalk | None:
        """The walks of this step's requests, None where nothing was verified."""
        if len(self._chunks) <= 1:
            return self._chunks[0] if self._chunks else None
        parts = [(chunk.rows, chunk.num_accepted, chunk.tokens) for chunk in self._chunks]
        return TensorWalk(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> SamplerOutput:
        # Stock tells drafts from placeholders by linear positions.
        linear = input_batch.positions.index_add(
            0, input_batch.logits_indices, self._slots.shift(input_batch), alpha=-1
        )
        return super().__call__(
            logits, replace(input_batch, positions=linear), draft_logits, invalid_drafts
        )

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Stock's arguments and results: processed logits, tokens [b, K + 1], numbers of tokens int32 [b]."""
        bounds = cu_num_logits.long()
        starts = bounds[:-1, None]
        present = self._rows < bounds[1:, None] - starts
        # Rows that a request does not have this time read its root's.
        place = torch.where(present, starts + self._rows, starts)
        tokens = torch.where(present, verify_draft_sampled.long()[place], -1)[:, 1:]
        parents = self._slots.parents[idx_mapping]
        alive = self._slots.alive[idx_mapping] & (tokens >= 0)

        row = expanded_local_pos.long()
        each = torch.arange(len(row), device=row.device)
        request = torch.searchsorted(bounds[1:], each, right=True)
        self._penalties.rows = RowsOfTrees(request, row, tokens, parents)
        sampled, processed = self.sampler.sample(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos + self._slots.depths[expanded_idx_mapping, row] - row,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
            return_logprobs=True,
        )
        self._penalties.rows = None
        found = tensors.walk(TreeTensors(tokens, parents, alive), sampled[place])
        self._chunks.append(found)
        on_path = row <= found.num_accepted[request]
        self._path_order = bounds[request] + torch.where(on_path, found.rows[request, row], row)
        return processed, found.tokens, (found.num_accepted + 1).int()

    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
        logits: torch.Tensor,
        cu_num_logits: torch.Tensor,
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> LogprobsTensors | None:
        """Stock's, on the rows of each request's path in its order."""
        if max_num_logprobs != NO_LOGPROBS:
            logits = logits[self._path_order]
        return super()._get_logprobs_tensors(
            sampled, num_sampled, logits, cu_num_logits, cu_num_logits_np, max_num_logprobs
        )
