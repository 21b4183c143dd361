# SPDX-License-Identifier: Apache-2.0
"""Drafts under the V2 runner: the speculator that it calls, and the sources behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_hidden_transfer.drafting.source import DraftBatch, DraftSource
from vllm_hidden_transfer.engine.v2.draft_graphs import DraftGraphs
from vllm_hidden_transfer.engine.v2.slot_batch import SlotBatch
from vllm_hidden_transfer.tree import TokenTree, TreeTensors

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_hidden_transfer.engine.v2.runner import TreeRunnerV2


class DeviceDraftSource(Protocol):
    """Proposes one token tree for each request of a batch, without waiting for the device."""

    transfer_layer: int | None
    """The layer whose incoming hidden state the source needs, None where it needs none."""
    draft_rows: int
    """Rows of a request in the source's pass through the target's layers, 0 where it runs none."""

    def on_target_loaded(self, model: Any) -> None:
        """Called once, when vLLM has loaded the target (its ``...ForCausalLM``)."""
        ...

    def propose_tensors(self, batch: SlotBatch) -> TreeTensors:
        """One tree of ``batch.budget`` nodes for each request."""
        ...

    def describe(self) -> str:
        """A few words for the banner at start."""
        ...


class HostDrafts:
    """A source that builds its trees on the host: for tests and measurements, because it waits for the device."""

    def __init__(self, source: DraftSource, runner: TreeRunnerV2) -> None:
        assert source.transfer_layer is None
        self.transfer_layer: int | None = None
        self.draft_rows = 0
        self._source = source
        self._runner = runner
        self.describe = source.describe
        self.on_target_loaded = source.on_target_loaded

    def propose_tensors(self, batch: SlotBatch) -> TreeTensors:
        states = self._runner.req_states
        known = states.all_token_ids.gpu[batch.slots].cpu().numpy()
        lengths = states.total_len.gpu[batch.slots].tolist()
        requests = [row for row, count in enumerate(batch.num_sampled.tolist()) if count]
        trees = [TokenTree.chain([])] * len(lengths)
        if requests:
            host_batch = DraftBatch(
                request_ids=[batch.request_ids[row] for row in requests],
                batch_rows=np.array(requests),
                token_ids=[known[row, : lengths[row]] for row in requests],
                hidden=None,
                budget=batch.budget,
            )
            for row, tree in zip(requests, self._source.propose(host_batch), strict=True):
                trees[row] = tree
        return TreeTensors.of(trees, batch.budget, batch.slots.device)


class TreeSpeculator(BaseSpeculator):
    """What the V2 runner calls after verification: hands the batch to the draft source and keeps the trees."""

    supports_mm_inputs = False
    draft_logits: torch.Tensor | None = None

    def __init__(self, runner: TreeRunnerV2) -> None:
        self._runner = runner
        self.graphs: DraftGraphs | None = None

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Once a KV cache; between two of them vLLM takes the graphs away again."""
        runner = self._runner
        rows = runner.draft_source.draft_rows
        if rows and cudagraph_mode.decode_mode() == CUDAGraphMode.FULL:
            self.graphs = DraftGraphs(
                runner.vllm_config,
                runner.device,
                rows,
                runner.num_speculative_steps,
            )

    def capture(self) -> None:
        if self.graphs is not None:
            self.graphs.capture_drafts(self._runner.draft_source.propose_tensors)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        *_: Any,
        dummy_run: bool = False,
        **__: Any,
    ) -> torch.Tensor:
        """Draft tokens int64 [b, K]; stock writes them into the slots, we their parents."""
        runner, slots = self._runner, input_batch.idx_mapping
        budget = runner.num_speculative_steps
        if dummy_run:
            return slots.new_zeros(len(slots), budget)
        states = runner.req_states
        hidden = None
        if aux_hidden_states is not None:
            hidden = aux_hidden_states[0][runner.last_rows]
        batch = SlotBatch(
            slots=slots,
            sampled=last_sampled[slots, 0],
            roots=states.num_computed_tokens.gpu[slots].long(),
            num_sampled=num_sampled,
            hidden=hidden,
            request_ids=input_batch.req_ids,
            budget=budget,
        )
        trees = self._drafted(batch)
        runner.slots.put(slots, trees)
        return trees.tokens

    def _drafted(self, batch: SlotBatch) -> TreeTensors:
        graph = None if self.graphs is None else self.graphs.fitting(batch)
        if graph is None:
            return self._runner.draft_source.propose_tensors(batch)
        assert self.graphs is not None
        return self.graphs.replayed(graph, batch)
