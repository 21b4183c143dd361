# SPDX-License-Identifier: Apache-2.0
"""The device side of the V2 adapter: trees attended, compacted and drafted by our Triton kernels. Never ran on a GPU.

A mixin for any V2 runner class, so that the test bed runs the same code on CPU tensors under Triton's interpreter.
Nothing here waits for the device, and what a captured graph reads stays at its address.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_hidden_transfer.engine.attention.kernels.compaction import compact_paths
from vllm_hidden_transfer.engine.attention.tree_backend import TreeBuilder, TreeRows
from vllm_hidden_transfer.engine.v2.runner import TreeRunnerV2
from vllm_hidden_transfer.engine.v2.slot_batch import SlotBatch
from vllm_hidden_transfer.tree import TensorWalk


class DeviceTrees(TreeRunnerV2):
    """Tree attention, compaction and draft rows on the device."""

    attention_name = "tree attention in Triton"
    exact = bool(envs.VLLM_BATCH_INVARIANT)
    """Rows get the bits that they would have without speculation, at a cost."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self._tree_rows = TreeRows.empty(
            self.max_num_reqs, self.num_speculative_steps + 1, device, exact=self.exact
        )
        steps = self.draft_source.draft_rows
        if steps:
            self._draft_rows = TreeRows.chain(self.max_num_reqs, steps, device)
            end = self.max_num_reqs * steps + 1
            self._draft_starts = torch.arange(0, end, steps, dtype=torch.int32, device=device)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        # Twice, where vLLM measures captured graphs on a throwaway cache first.
        super().initialize_kv_cache(*args, **kwargs)
        groups = self.kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise ValueError(
                "hidden_transfer needs one kind of KV cache for all layers, and this model has "
                f"{len(groups)} kinds: serve it without speculation"
            )
        (self._builder,) = self._tree_builders()
        self._layer_names = groups[0].layer_names
        layers: Any = self.compilation_config.static_forward_context
        caches = [layers[name].kv_cache for name in self._layer_names]
        self._cache = caches[0]
        self._cache_addresses = torch.tensor(
            [cache.data_ptr() for cache in caches], dtype=torch.int64, device=self.device
        )
        heads = self.model_config.get_num_attention_heads(self.parallel_config)
        self._builder.take_trees(
            self._tree_rows, self.draft_source.draft_rows, heads, self._compute_units()
        )

    def _tree_builders(self) -> list[TreeBuilder]:
        builders = [
            builder
            for groups in self.attn_groups
            for group in groups
            for builder in group.metadata_builders
        ]
        if any(not isinstance(builder, TreeBuilder) for builder in builders):
            names = sorted({type(builder).__name__ for builder in builders})
            raise ValueError(
                f"hidden_transfer has no tree attention for the backend that vLLM selected ({', '.join(names)}): "
                "give --attention-backend FLASH_ATTN or TRITON_ATTN"
            )
        return builders

    def _compute_units(self) -> int:
        return current_platform.num_compute_units()

    def set_batch_trees(self, batch: InputBatch) -> None:
        bounds = batch.cu_num_logits
        drafts = bounds[1:] - bounds[:-1] - 1
        # Also without drafts: whichever graph is replayed next must not find another step's trees.
        self._tree_rows.write(self.slots.parents, batch.idx_mapping, drafts)
        self._builder.rows = self._tree_rows if batch.num_draft_tokens else None

    def compact_accepted(self, roots: torch.Tensor, walk: TensorWalk) -> None:
        compact_paths(
            self._cache_addresses,
            self._cache,
            self.step_slots,
            roots,
            walk.rows,
            walk.num_accepted,
        )

    def draft_attention(
        self, batch: SlotBatch, positions: torch.Tensor
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Pseudo rows see the request's cache and each other, and are written nowhere: no blocks, no slots."""
        requests = len(positions)
        metadata = self._builder.draft_pass(
            self._draft_rows,
            (positions[:, -1] + 1).int(),
            self._draft_starts[: requests + 1],
            # The verification step's, in the order of its batch.
            self.block_tables.input_block_tables[0][:requests],
        )
        return dict.fromkeys(self._layer_names, metadata), {}

    def forget_drafts(self, unusable: torch.Tensor) -> None:
        """Nothing was written."""
