# SPDX-License-Identifier: Apache-2.0
"""Tree paths on vLLM's CPU attention backend, for either model runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_hidden_transfer.engine.cpu_attention import TreeAttentionMetadataBuilder
from vllm_hidden_transfer.engine.kv_store import KVStore
from vllm_hidden_transfer.tree import TokenTree

logger = init_logger("vllm.hidden_transfer")


class CPUPaths:
    """Mixin of a CPU model runner: its attention metadata builders and the scratch blocks behind its cache."""

    store: KVStore
    attn_groups: Any
    compilation_config: Any
    attention_name = "tree paths on CPU_ATTN"

    def open_store(self, caches: Mapping[str, torch.Tensor], num_blocks: int, scratch: int) -> None:
        """Take over the caches that were just allocated with ``scratch`` blocks behind the scheduler's."""
        layers = self.compilation_config.static_forward_context
        self.store = KVStore(caches, range(num_blocks, num_blocks + scratch), layers)
        size = sum(cache[0].nbytes for cache in caches.values())
        logger.info(
            "hidden_transfer: %d scratch blocks for tree paths (%.0f MiB beside the KV cache)",
            scratch,
            scratch * size / 2**20,
        )
        for builder in self._builders():
            builder.store = self.store

    def _builders(self) -> list[TreeAttentionMetadataBuilder]:
        return [
            builder
            for groups in self.attn_groups
            for group in groups
            for builder in group.metadata_builders
        ]

    def set_trees(self, trees: Sequence[TokenTree | None] | None) -> None:
        """Hand the trees of the next pass to the attention metadata builder; None for a stock pass."""
        for builder in self._builders():
            builder.trees = trees

    def compact(self, rows: Sequence[int], slots: Sequence[int]) -> None:
        """Move the keys and values of rows of the last pass into slots of the paged cache."""
        if rows:
            (builder,) = self._builders()
            assert builder.last_pass is not None
            builder.last_pass.compact(rows, slots, builder.isa)

    def clear(self, slots: torch.Tensor) -> None:
        """Write zeros into some slots (int64 [n]) of the paged cache, in all layers."""
        (builder,) = self._builders()
        self.store.clear(slots, builder.dtype, builder.isa)

    def draft_metadata(
        self, common: CommonAttentionMetadata
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Attention metadata and slots of a draft pass, by layer name."""
        (builder,) = self._builders()
        metadata = builder.build(0, common)
        names = self.store.layer_names
        return dict.fromkeys(names, metadata), dict.fromkeys(names, common.slot_mapping)
