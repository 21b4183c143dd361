# SPDX-License-Identifier: Apache-2.0
"""The CPU adapter: vLLM's CPU worker, and its V1 CPU model runner with tree attention."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_hidden_transfer.drafting.source import DraftSource
from vllm_hidden_transfer.engine.attention.cpu import TreeAttentionBackend
from vllm_hidden_transfer.engine.attention.cpu_paths import CPUPaths
from vllm_hidden_transfer.engine.attention.kv_store import (
    blocks_beside_scratch,
    num_scratch_blocks,
    side_rows_bytes,
    with_scratch_blocks,
)
from vllm_hidden_transfer.engine.v1.runner import TreeRunner
from vllm_hidden_transfer.engine.v1.transfer_source import TransferSource
from vllm_hidden_transfer.patches import attention_backend, cpu_model_runner, seeded_chunks


class TreeCPUModelRunner(CPUPaths, TreeRunner, CPUModelRunner):
    """Tree verification and two-pass drafting on the CPU."""

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
        self.open_store(caches, num_blocks, scratch)
        return caches

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
        return TransferSource(self, self.settings.checkpoint, self.settings.sources)


class HiddenTransferCPUWorker(CPUWorker):
    """vLLM's CPU worker around a runner of ours, for whichever generation of model runners vLLM chose."""

    def init_device(self) -> None:
        with cpu_model_runner.replaced_by(self._runner_class(), v2=self.use_v2_model_runner):
            super().init_device()

    def _runner_class(self) -> type:
        if not self.use_v2_model_runner:
            return TreeCPUModelRunner
        # V2 needs Triton, which a V1 engine need not have.
        from vllm_hidden_transfer.engine.v2.cpu import TreeCPUModelRunnerV2

        return TreeCPUModelRunnerV2

    def determine_available_memory(self) -> int:
        """Where vLLM sizes the KV cache itself, it leaves room for what lies beside it; a size that the user gave is
        the cache's own."""
        available: int = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes is not None:
            return available
        specs = self.get_kv_cache_spec().values()
        block = sum(spec.page_size_bytes for spec in specs)
        budget = self.vllm_config.num_speculative_tokens
        seqs, tokens = (
            self.scheduler_config.max_num_seqs,
            self.scheduler_config.max_num_batched_tokens,
        )
        rows = side_rows_bytes(specs, seqs * budget, tokens, self.model_config.dtype)
        return block * blocks_beside_scratch((available - rows) // block, seqs, budget)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        path = f"{TreeAttentionBackend.__module__}.{TreeAttentionBackend.__name__}"
        with attention_backend.replaced_by({"CPU_ATTN": path}):
            super().load_model(*args, **kwargs)
