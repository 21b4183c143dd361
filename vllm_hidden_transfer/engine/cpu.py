# SPDX-License-Identifier: Apache-2.0
"""The CPU adapter: vLLM's CPU worker and V1 CPU model runner with tree attention."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_hidden_transfer.drafting.source import DraftSource
from vllm_hidden_transfer.engine.cpu_attention import (
    TreeAttentionBackend,
    TreeAttentionMetadataBuilder,
)
from vllm_hidden_transfer.engine.kv_store import (
    KVStore,
    num_scratch_blocks,
    with_scratch_blocks,
)
from vllm_hidden_transfer.engine.runner import TreeRunner
from vllm_hidden_transfer.engine.transfer_source import TransferSource
from vllm_hidden_transfer.patches import cpu_attention_backend, cpu_model_runner, seeded_chunks
from vllm_hidden_transfer.tree import TokenTree, fit_to_scratch

logger = init_logger("vllm.hidden_transfer")


class TreeCPUModelRunner(TreeRunner, CPUModelRunner):
    """Tree verification and two-pass drafting on the CPU."""

    store: KVStore
    attention_name = "tree paths on CPU_ATTN"

    def initialize_kv_cache_tensors(
        self,
        kv_cache_config: KVCacheConfig,
        kernel_block_sizes: list[int],
        kv_cache_allocation_context: AbstractContextManager | None = None,
    ) -> dict[str, torch.Tensor]:
        num_blocks = kv_cache_config.num_blocks
        scratch = num_scratch_blocks(num_blocks, self.max_num_reqs, self.num_spec_tokens)
        caches = super().initialize_kv_cache_tensors(
            with_scratch_blocks(kv_cache_config, scratch),
            kernel_block_sizes,
            kv_cache_allocation_context,
        )
        layers = self.compilation_config.static_forward_context
        self.store = KVStore(caches, range(num_blocks, num_blocks + scratch), layers)
        (tensor,) = kv_cache_config.kv_cache_tensors
        logger.info(
            "hidden_transfer: %d scratch blocks for tree paths (%.0f MiB beside the KV cache)",
            scratch,
            scratch * tensor.block_stride * len(tensor.layers) / 2**20,
        )
        for builder in self._builders():
            builder.store = self.store
        return caches

    def _builders(self) -> list[TreeAttentionMetadataBuilder]:
        return [
            builder
            for groups in self.attn_groups
            for group in groups
            for builder in group.metadata_builders
        ]

    def set_trees(self, trees: Sequence[TokenTree | None] | None) -> None:
        for builder in self._builders():
            builder.trees = trees

    def compact(self, rows: Sequence[int], slots: Sequence[int]) -> None:
        if rows:
            (builder,) = self._builders()
            assert builder.last_pass is not None
            builder.last_pass.compact(rows, slots, builder.isa)

    def clear(self, slots: NDArray[np.int64]) -> None:
        """Write zeros into some slots of the paged cache, in all layers."""
        (builder,) = self._builders()
        self.store.clear(torch.from_numpy(slots.astype(np.int64)), builder.dtype, builder.isa)

    def fit_to_scratch(self, trees: list[TokenTree], first_positions: list[int]) -> list[TokenTree]:
        store = self.store
        return fit_to_scratch(trees, first_positions, store.block_size, len(store.scratch))

    def draft_metadata(
        self, common: CommonAttentionMetadata
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Attention metadata and slots of a draft pass, by layer name."""
        (builder,) = self._builders()
        metadata = builder.build(0, common)
        names = self.store.layer_names
        return dict.fromkeys(names, metadata), dict.fromkeys(names, common.slot_mapping)

    def _sample(
        self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        self._unfinished_generators = seeded_chunks.unfinished_generators(self)
        return super()._sample(logits, spec_decode_metadata)

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        with seeded_chunks.rewound(self, self._unfinished_generators):
            return super()._bookkeeping_sync(*args, **kwargs)

    def make_transfer_source(self) -> DraftSource:
        assert self.settings.checkpoint is not None
        return TransferSource(self, self.settings.checkpoint)


class HiddenTransferCPUWorker(CPUWorker):
    """vLLM's CPU worker around :class:`TreeCPUModelRunner`."""

    def init_device(self) -> None:
        with cpu_model_runner.replaced_by(TreeCPUModelRunner):
            super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with cpu_attention_backend.replaced_by(
            f"{TreeAttentionBackend.__module__}.{TreeAttentionBackend.__name__}"
        ):
            super().load_model(*args, **kwargs)
