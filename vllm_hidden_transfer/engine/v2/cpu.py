# SPDX-License-Identifier: Apache-2.0
"""The CPU side of the V2 adapter: a functional test bed under Triton's interpreter, not a product.

Its attention is the V1 adapter's, which lays trees out on the host; nothing outside this module does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.cpu.model_runner import CPUModelRunner

from vllm_hidden_transfer.engine.announce import UNUSABLE_DRAFTS
from vllm_hidden_transfer.engine.attention.cpu_paths import CPUPaths
from vllm_hidden_transfer.engine.attention.kv_store import num_scratch_blocks, with_scratch_blocks
from vllm_hidden_transfer.engine.v2.runner import TreeRunnerV2
from vllm_hidden_transfer.engine.v2.slot_batch import SlotBatch
from vllm_hidden_transfer.tree import TensorWalk, TokenTree, draft_blocks

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.input_batch import InputBatch

logger = init_logger("vllm.hidden_transfer")


class TreeCPUModelRunnerV2(CPUPaths, TreeRunnerV2, CPUModelRunner):
    """Tree verification and two-pass drafting under V2 on the CPU."""

    unusable_rows = 0
    """Draft rows so far whose logits were NaN or infinite."""

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        scratch = num_scratch_blocks(
            kv_cache_config.num_blocks, self.max_num_reqs, self.num_speculative_steps
        )
        larger = with_scratch_blocks(kv_cache_config, scratch)
        super().initialize_kv_cache(larger, *args, **kwargs)
        layers = self.compilation_config.static_forward_context
        (group,) = kv_cache_config.kv_cache_groups
        caches = {name: layers[name].kv_cache for name in group.layer_names}
        self.open_store(caches, kv_cache_config.num_blocks, scratch)

    def set_batch_trees(self, batch: InputBatch) -> None:
        roots = batch.logits_indices[batch.cu_num_logits[:-1].long()].numpy()
        if not batch.num_draft_tokens:
            self.set_trees(None, roots)
            return
        counts = batch.num_draft_tokens_per_req
        assert counts is not None
        slots = batch.idx_mapping
        parents = self.slots.parents[slots].numpy()
        # Attention does not look at tokens, and a dead node is a row like another.
        trees = [
            TokenTree(np.zeros(count, dtype=np.int64), parents[row, :count]) if count else None
            for row, count in enumerate(counts.tolist())
        ]
        starts = batch.query_start_loc_np[: len(trees)].astype(np.int64)
        first_positions = batch.positions[starts].numpy()
        fitted = self.fit_to_scratch(trees, first_positions, roots - starts + 1)
        for slot, tree, whole in zip(slots.tolist(), fitted, trees, strict=True):
            if tree is not None and tree is not whole:
                self.slots.alive[slot, len(tree) :] = False
        self.set_trees(fitted, roots)

    def compact_accepted(self, roots: torch.Tensor, walk: TensorWalk) -> None:
        depths = torch.arange(1, self.slots.num_nodes + 1)
        path = walk.rows[:, 1:]
        moved = (depths <= walk.num_accepted[:, None]) & (path != depths)
        places = (roots[:, None] + depths).clamp(max=len(self.step_slots) - 1)
        rows, slots = roots[:, None] + path, self.step_slots[places]
        self.compact(rows[moved].numpy(), slots[moved].numpy())

    def draft_attention(
        self, batch: SlotBatch, positions: torch.Tensor
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Pseudo rows lie in the request's own blocks, into which the next step writes before it reads them, or in
        scratch where no block is allocated."""
        size = self.store.block_size
        num_requests, steps = positions.shape
        lengths = positions[:, -1] + 1
        # Rows without a block of their own draft at random here, and their drafts are rejected.
        found, _ = draft_blocks(
            self.block_tables.block_tables[0].gpu[batch.slots].numpy(),
            self.block_tables.num_blocks.gpu[0, batch.slots].numpy(),
            lengths.numpy(),
            size,
            self.store.scratch,
        )
        blocks = torch.from_numpy(found)
        slots = blocks.gather(1, positions // size) * size + positions % size
        self._draft_slots = slots
        starts = torch.arange(0, num_requests * steps + 1, steps, dtype=torch.int32)
        self.set_trees(None, np.zeros(0, dtype=np.int64))
        return self.draft_metadata(
            CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=lengths.int(),
                num_reqs=num_requests,
                num_actual_tokens=num_requests * steps,
                max_query_len=steps,
                max_seq_len=int(lengths.max()),
                block_table_tensor=blocks.int(),
                slot_mapping=slots.flatten(),
            )
        )

    def forget_drafts(self, unusable: torch.Tensor) -> None:
        """The kernel reads whole blocks and 0 x NaN is NaN, so such rows become zeros; said once, counted always."""
        count = int(unusable.sum())
        if not count:
            return
        self.clear(self._draft_slots[unusable])
        if not self.unusable_rows:
            logger.warning(UNUSABLE_DRAFTS)
        self.unusable_rows += count
