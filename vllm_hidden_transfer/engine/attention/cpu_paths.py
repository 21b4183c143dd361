# SPDX-License-Identifier: Apache-2.0
"""Tree paths on vLLM's CPU attention backend, for either model runner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_hidden_transfer.engine.attention.cpu import TreeAttentionMetadataBuilder
from vllm_hidden_transfer.engine.attention.kv_store import IntArray, KVStore, side_rows_bytes
from vllm_hidden_transfer.tree import Scratch, TokenTree, fit_to_scratch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.hidden_transfer")

TREES_CUT = (
    "hidden_transfer: the %d scratch blocks are too few for the trees of %d requests at once, so that %d of their %d "
    "nodes were cut and fewer drafts will be accepted: give the KV cache more memory (--kv-cache-memory-bytes or "
    "VLLM_CPU_KVCACHE_SPACE), or lower --max-num-seqs or num_speculative_tokens. This is said once."
)


def _num_nodes(trees: Iterable[TokenTree | None]) -> int:
    return sum(len(tree) for tree in trees if tree is not None)


class CPUPaths:
    """Mixin of a CPU model runner: its attention metadata builders and the scratch blocks behind its cache."""

    store: KVStore
    attn_groups: Any
    compilation_config: Any
    vllm_config: VllmConfig
    get_kv_cache_spec: Callable[[], dict[str, Any]]
    attention_name = "tree paths on CPU_ATTN"
    cut_nodes = 0
    """Nodes so far that were cut off trees for lack of scratch blocks."""

    def open_store(self, caches: Mapping[str, torch.Tensor], num_blocks: int, scratch: int) -> None:
        """Take over the caches that were just allocated with ``scratch`` blocks behind the scheduler's."""
        layers = self.compilation_config.static_forward_context
        # The last one takes what nobody reads.
        last = num_blocks + scratch - 1
        self.store = KVStore(caches, Scratch(range(num_blocks, last), last), layers)
        blocks = scratch * sum(cache[0].nbytes for cache in caches.values())
        scheduler, nodes = (
            self.vllm_config.scheduler_config,
            self.vllm_config.num_speculative_tokens,
        )
        rows = side_rows_bytes(
            self.get_kv_cache_spec().values(),
            scheduler.max_num_seqs * nodes,
            scheduler.max_num_batched_tokens,
            self.vllm_config.model_config.dtype,
        )
        logger.info(
            "hidden_transfer: %.0f MiB beside the KV cache: %.0f for %d scratch blocks, up to %.0f for rows to move",
            (blocks + rows) / 2**20,
            blocks / 2**20,
            scratch,
            rows / 2**20,
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

    def set_trees(self, trees: Sequence[TokenTree | None] | None, root_rows: IntArray) -> None:
        """Hand the trees of the next pass and the rows of their roots to the attention metadata builder; None for a
        stock pass."""
        for builder in self._builders():
            builder.trees, builder.root_rows = trees, root_rows

    def fit_to_scratch(
        self,
        trees: Sequence[TokenTree | None],
        first_positions: IntArray,
        rows_before: IntArray,
    ) -> list[TokenTree | None]:
        """Cut runs off trees that one pass has no scratch blocks for; said once, counted always."""
        store = self.store
        num_scratch = len(store.scratch.blocks)
        fitted = fit_to_scratch(trees, first_positions, rows_before, store.block_size, num_scratch)
        if (cut := _num_nodes(trees) - _num_nodes(fitted)) and not self.cut_nodes:
            logger.warning(TREES_CUT, num_scratch, len(trees), cut, _num_nodes(trees))
        self.cut_nodes += cut
        return fitted

    def compact(self, rows: IntArray, slots: IntArray) -> None:
        """Move the keys and values of rows of the last pass into slots of the paged cache."""
        if len(rows):
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
