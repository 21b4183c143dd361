# SPDX-License-Identifier: Apache-2.0
"""Tree attention on vLLM's CPU kernel, by path decomposition. Ran on x86-64 with AVX2 and AVX-512.

The kernel, its metadata and its cache layout stay stock: only the sequences that it is given are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_hidden_transfer.engine.attention.kv_store import IntArray, KVStore, TreePass
from vllm_hidden_transfer.tree import TokenTree, lay_out_paths


@dataclass
class TreeAttentionMetadata(CPUAttentionMetadata):
    """Stock metadata over the runs of a pass, with the pass's writes."""

    tree_pass: TreePass | None = None


class TreeAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Expands the requests of a pass with trees into their runs; any other pass is stock's."""

    trees: Sequence[TokenTree | None] | None = None
    """The trees of the next pass to build, one entry a request; None for a stock pass."""
    root_rows: IntArray
    """int64 [requests]: the rows of their roots."""
    store: KVStore
    last_pass: TreePass | None = None
    """The last pass with trees that was built; compaction reads its rows."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        # Rows of nodes that were cut off a chain stand behind it and are seen by nobody, as in stock speculation.
        if self.trees is None or all(tree is None or tree.is_chain for tree in self.trees):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        starts = common_attn_metadata.query_start_loc.numpy().astype("int64")
        layout = lay_out_paths(
            self.trees,
            self.root_rows,
            starts,
            common_attn_metadata.seq_lens.numpy() - (starts[1:] - starts[:-1]),
            common_attn_metadata.block_table_tensor.numpy(),
            self.block_size,
            self.store.scratch,
        )
        expanded = replace(
            common_attn_metadata,
            query_start_loc=torch.from_numpy(layout.query_starts).int(),
            query_start_loc_cpu=torch.from_numpy(layout.query_starts).int(),
            seq_lens=torch.from_numpy(layout.seq_lens).int(),
            num_reqs=len(layout.seq_lens),
            max_query_len=int((layout.query_starts[1:] - layout.query_starts[:-1]).max()),
            max_seq_len=int(layout.seq_lens.max()),
            block_table_tensor=torch.from_numpy(layout.block_table).int(),
        )
        stock = super().build(common_prefix_len, expanded, fast_build)
        values = {field.name: getattr(stock, field.name) for field in fields(CPUAttentionMetadata)}
        self.last_pass = TreePass(layout, self.store, self.dtype)
        return TreeAttentionMetadata(**values, tree_pass=self.last_pass)


class TreeAttentionImpl(CPUAttentionBackendImpl):
    """Writes a pass with trees once for each sequence that reads a row; attends as stock does."""

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        metadata = get_forward_context().attn_metadata
        tree_pass = None
        if isinstance(metadata, dict):
            tree_pass = getattr(metadata.get(layer.layer_name), "tree_pass", None)
        if tree_pass is not None:
            key, value = tree_pass.save(layer.layer_name, key, value)
            slot_mapping = tree_pass.slots
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)


class TreeAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU backend with the two subclasses above."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return TreeAttentionMetadataBuilder
