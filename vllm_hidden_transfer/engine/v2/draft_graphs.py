# SPDX-License-Identifier: Apache-2.0
"""Draft passes as CUDA graphs of their own, one for each number of requests. Ran on a fake graph only, never on a GPU.

The pattern is that of vLLM's parallel drafters (v1/worker/gpu/spec_decode/dflash): a manager beside the model's, whose
graphs hold the whole pass from the hidden states to the trees. What a step knows is copied to fixed addresses before a
replay, and the trees are read from fixed addresses behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_hidden_transfer.engine.v2.slot_batch import SlotBatch
from vllm_hidden_transfer.tree import TreeTensors

Drafter = Callable[[SlotBatch], TreeTensors]
"""From a batch to its trees, without waiting for the device."""


class DraftGraphs(CudaGraphManager):
    """Graphs of a drafter.

    Args:
        vllm_config: with the sizes that vLLM captures.
        device: the GPU.
        draft_rows: rows of a request in the drafter's pass through the target.
        budget: nodes of a tree.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        draft_rows: int,
        budget: int,
    ) -> None:
        super().__init__(
            vllm_config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=draft_rows
        )

        def make(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        requests = self.max_num_reqs
        hidden_size = vllm_config.model_config.get_hidden_size()
        self._batch = SlotBatch(
            slots=make(requests),
            sampled=make(requests),
            roots=make(requests),
            num_sampled=make(requests, dtype=torch.int32),
            hidden=make(requests, hidden_size, dtype=vllm_config.model_config.dtype),
            request_ids=[],
            budget=budget,
        )
        self._trees = TreeTensors(
            make(requests, budget), make(requests, budget), make(requests, budget, dtype=torch.bool)
        )

    def capture_drafts(self, draft: Drafter) -> None:
        """Record a drafter at every size."""

        def create_forward(
            desc: BatchExecutionDescriptor, warmup: bool
        ) -> Callable[[CUDAGraphMode], None]:
            assert desc.num_reqs is not None
            requests = desc.num_reqs
            return lambda _: self._draft(draft, requests)

        self.capture(create_forward, "Capturing draft passes")

    def _draft(self, draft: Drafter, requests: int) -> None:
        trees = draft(self._first(requests))
        for kept, part in zip(self._parts(requests), _parts_of(trees), strict=True):
            kept.copy_(part)

    def fitting(self, batch: SlotBatch) -> BatchExecutionDescriptor | None:
        """The graph to replay for a batch, None where none was captured that is large enough."""
        requests, rows = len(batch.slots), self.decode_query_len
        found = self.dispatch(requests, requests * rows, rows, num_active_loras=0)
        return found if found.cg_mode == CUDAGraphMode.FULL else None

    def replayed(self, graph: BatchExecutionDescriptor, batch: SlotBatch) -> TreeTensors:
        """The trees of a batch, by a graph that fits it. The next replay overwrites them."""
        requests = len(batch.slots)
        mine = self._first(requests)
        for name in ("slots", "sampled", "roots", "num_sampled", "hidden"):
            getattr(mine, name).copy_(getattr(batch, name))
        # Rows of no request: they attend to nothing but themselves.
        self._batch.roots[requests : graph.num_reqs].zero_()
        self.run_fullgraph(graph)
        return TreeTensors(*self._parts(requests))

    def _first(self, requests: int) -> SlotBatch:
        whole = self._batch
        assert whole.hidden is not None
        return replace(
            whole,
            slots=whole.slots[:requests],
            sampled=whole.sampled[:requests],
            roots=whole.roots[:requests],
            num_sampled=whole.num_sampled[:requests],
            hidden=whole.hidden[:requests],
        )

    def _parts(self, requests: int) -> list[torch.Tensor]:
        return [part[:requests] for part in _parts_of(self._trees)]


def _parts_of(trees: TreeTensors) -> tuple[Any, ...]:
    return trees.tokens, trees.parents, trees.alive
