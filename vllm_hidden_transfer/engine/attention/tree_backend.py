# SPDX-License-Identifier: Apache-2.0
"""Tree attention around whatever backend vLLM selected, on our own Triton kernels. Never ran on a GPU.

A pass without trees is stock's own. In a pass with trees the requests of at most K + 1 rows, which vLLM's V2 runner
sorts to the front, go through one launch of the tree kernel, and the prompt chunks behind them through stock's forward.
Keys and values are written by stock in either case.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.worker.ubatch_utils import UBatchSlice, split_attn_metadata

from vllm_hidden_transfer.engine.attention.kernels.ancestors import num_words, write_ancestors
from vllm_hidden_transfer.engine.attention.kernels.exact_rows import exact_rows, paths
from vllm_hidden_transfer.engine.attention.kernels.tree_attention import (
    Parts,
    choose_block_m,
    choose_splits,
    tree_attention,
)

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True)
class TreeRows:
    """Who sees whom among the rows of a pass. A captured graph reads each step's values at the same addresses, so the
    tensors are made once and written in place."""

    words: torch.Tensor
    """int32 [requests, rows, words]: bit j of a row's words says that row j is the row or an ancestor of it."""
    depths: torch.Tensor
    """int32 [requests, rows]."""
    path: torch.Tensor | None = None
    """int32 [requests, rows, rows]: the row of a row's ancestor at each depth, where rows are computed exactly as
    without speculation."""
    dense: bool = False
    """The rows' own keys and values come from the pass and are not in the cache."""

    @classmethod
    def empty(
        cls, requests: int, rows: int, device: torch.device, *, exact: bool = False
    ) -> TreeRows:
        def make(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        return cls(
            make(requests, rows, num_words(rows)),
            make(requests, rows),
            make(requests, rows, rows) if exact else None,
        )

    @classmethod
    def chain(cls, requests: int, rows: int, device: torch.device) -> TreeRows:
        """Rows that each follow the one before, as those of a draft pass: dense."""
        found = cls.empty(requests, rows, device)
        parents = torch.arange(rows - 1, device=device).expand(requests, -1).contiguous() - 1
        slots = torch.arange(requests, device=device)
        write_ancestors(found.words, found.depths, parents, slots, torch.zeros_like(slots).int())
        return cls(found.words, found.depths, dense=True)

    def write(self, parents: torch.Tensor, slots: torch.Tensor, num_drafts: torch.Tensor) -> None:
        """Describe the trees of a batch.

        Args:
            parents: int64 [slots, rows - 1], each node's parent, -1 for a child of the root.
            slots: int64 [b], the batch's requests.
            num_drafts: int32 [b], nodes of each; a request without any is a chain, whatever its slot holds.
        """
        write_ancestors(self.words, self.depths, parents, slots, num_drafts)
        if self.path is not None:
            requests = len(slots)
            found = paths(parents[slots], self.depths[:requests], num_drafts > 0)
            self.path[:requests].copy_(found)

    def of(self, requests: int) -> TreeRows:
        """The first requests'."""
        path = None if self.path is None else self.path[:requests]
        return TreeRows(self.words[:requests], self.depths[:requests], path, self.dense)


@dataclass(frozen=True)
class TreePass:
    """What attention needs beside stock's metadata in a pass with trees."""

    rows: TreeRows
    num_tokens: int
    """Rows of the requests with at most K + 1 rows, which come first."""
    max_rows: int
    """Of one of these requests."""
    splits: int
    parts: Parts | None
    starts: torch.Tensor
    """int32 [b + 1]: the first row of each of them."""
    seq_lens: torch.Tensor
    """int32 [b]."""
    block_table: torch.Tensor
    """int32 [b, blocks]."""
    chunks: Any = None
    """Stock's metadata of the requests behind them."""


class Workspace:
    """Room for the partial results of split launches: one allocation, because a captured graph keeps its address.

    Args:
        num_parts: rows times splits of the largest launch.
        heads: query heads.
        head_size: of them.
        device: where.
    """

    def __init__(self, num_parts: int, heads: int, head_size: int, device: torch.device) -> None:
        self._heads, self._head_size = heads, head_size
        room = Parts.empty(num_parts, heads, 1, head_size, device)
        self._flat = [part.flatten() for part in (room.values, room.tops, room.totals)]

    def parts(self, num_rows: int, splits: int) -> Parts | None:
        """Of one launch; None where nothing is split."""
        if splits == 1:
            return None
        shape = (num_rows, self._heads, splits)
        values, tops, totals = self._flat
        width = values.numel() // tops.numel()
        size = num_rows * self._heads * splits
        assert size <= tops.numel()
        return Parts(
            values[: size * width].view(*shape, width),
            tops[:size].view(shape),
            totals[:size].view(shape),
        )

    @property
    def num_bytes(self) -> int:
        return sum(flat.nbytes for flat in self._flat)


@dataclass(frozen=True)
class DraftMetadata:
    """All that attention needs in a draft pass, whose rows stock has no part in."""

    trees: TreePass


class TreeBuilder:
    """Mixin of a backend's metadata builder."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    rows: TreeRows | None = None
    """The rows of the next pass to build; None for a stock pass."""
    captured_rows: TreeRows
    """Those that a captured verification step reads."""
    workspace: Workspace

    @classmethod
    def get_cudagraph_support(cls, *_: Any) -> AttentionCGSupport:
        return cls._cudagraph_support

    def take_trees(self, rows: TreeRows, draft_rows: int, heads: int, compute_units: int) -> None:
        """Called once a KV cache: from here on passes may have trees.

        Args:
            rows: of the verification steps, at their addresses.
            draft_rows: of a request in a draft pass.
            heads: query heads of this rank.
            compute_units: multiprocessors of the device, which the launches are to fill.
        """
        spec: Any = self.kv_cache_spec  # type: ignore[attr-defined]
        self.captured_rows, self._compute_units = rows, compute_units
        self._group, self._kv_heads = heads // spec.num_kv_heads, spec.num_kv_heads
        max_requests, max_rows = rows.depths.shape
        largest = max(
            requests * each * self._splits(requests, each)
            for requests in range(1, max_requests + 1)
            for each in {max_rows, max(draft_rows, 1)}
        )
        self.workspace = Workspace(largest, heads, spec.head_size, rows.words.device)

    def draft_pass(
        self, rows: TreeRows, seq_lens: torch.Tensor, starts: torch.Tensor, tables: torch.Tensor
    ) -> DraftMetadata:
        """Attention of dense rows, as many for each request, which are in no cache.

        Args:
            rows: int32 [requests or more, k, ...].
            seq_lens: int32 [requests], up to each one's last row.
            starts: int32 [requests + 1].
            tables: int32 [requests, blocks].
        """
        requests, each = len(seq_lens), rows.depths.shape[1]
        return DraftMetadata(
            self._tree_pass(rows, requests, requests * each, seq_lens, starts, tables)
        )

    def _splits(self, requests: int, max_rows: int) -> int:
        lanes = max_rows * self._group
        blocks = -(-lanes // choose_block_m(max_rows, self._group))
        return choose_splits(requests, blocks, self._kv_heads, self._compute_units)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        stock: Any = super().build  # type: ignore[misc]
        metadata = stock(common_prefix_len, common_attn_metadata, fast_build)
        if self.rows is None:
            return metadata
        common, rows = common_attn_metadata, self.rows
        requests, others, tokens, _ = split_decodes_and_prefills(common, rows.depths.shape[1])
        found = self._tree_pass(
            rows,
            requests,
            tokens,
            common.seq_lens[:requests],
            common.query_start_loc[: requests + 1],
            common.block_table_tensor[:requests],
        )
        if others:
            behind = UBatchSlice(
                slice(requests, common.num_reqs), slice(tokens, common.num_actual_tokens)
            )
            chunks = stock(0, split_attn_metadata([behind], common)[0])
            found = replace(found, chunks=chunks)
        return _with_trees(metadata, found)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """A captured step is a uniform decode of K + 1 rows, all of them trees."""
        self.rows = self.captured_rows
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        finally:
            self.rows = None

    def _tree_pass(
        self,
        rows: TreeRows,
        requests: int,
        num_tokens: int,
        seq_lens: torch.Tensor,
        starts: torch.Tensor,
        tables: torch.Tensor,
    ) -> TreePass:
        # Not the longest of this step: the workspace was made for launches of exactly these rows.
        max_rows = rows.depths.shape[1]
        splits = self._splits(requests, max_rows) if requests else 1
        parts = self.workspace.parts(num_tokens, splits)
        return TreePass(
            rows.of(requests), num_tokens, max_rows, splits, parts, starts, seq_lens, tables
        )


def _half_tile() -> int | None:
    """Keys of a tile in half precision, None for the launcher's own number: from what the compiler spilled
    (``tests/support/aot.py``), where 64 do not fit the registers of sm_80, 89 and 120."""
    capability = current_platform.get_device_capability()
    return None if capability is None or capability.major in (9, 10) else 32


class TreeImpl:
    """Mixin of a backend's attention."""

    head_size: int
    scale: float
    sliding_window: tuple[int, int]
    logits_soft_cap: float
    sinks: torch.Tensor | None
    kv_cache_dtype: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stock: Any = self
        if stock.attn_type != AttentionType.DECODER or stock.alibi_slopes is not None:
            raise ValueError(
                "hidden_transfer's tree attention on GPUs serves decoders without ALiBi: serve this model without it"
            )
        self._half_tile = _half_tile()
        # Stock hands over queries in fp8 where its kernel wants them; ours does not.
        self.supports_quant_query_input = False

    def fused_output_quant_supported(self, *_: Any) -> bool:
        return False

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        stock: Any = super().forward  # type: ignore[misc]
        trees: TreePass | None = getattr(attn_metadata, "trees", None)
        if trees is None:
            found: torch.Tensor = stock(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
            return found
        own = trees.num_tokens
        if own:
            self._attend(layer, query[:own], key[:own], value[:own], kv_cache, trees, output[:own])
        if trees.chunks is not None:
            rest = (query[own:], key[own:], value[own:])
            stock(layer, *rest, kv_cache, trees.chunks, output[own:])
        return output

    def _attend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        trees: TreePass,
        output: torch.Tensor,
    ) -> None:
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        if self.kv_cache_dtype.startswith("fp8"):
            keys, values = (part.view(current_platform.fp8_dtype()) for part in (keys, values))
        rows = trees.rows
        places = (trees.block_table, trees.seq_lens, trees.starts)
        if rows.path is not None and not rows.dense:
            exact_rows(query, keys, values, output, *places, rows.path, rows.depths, self.scale)
            return
        tree_attention(
            query,
            keys,
            values,
            output,
            *places,
            rows.words,
            rows.depths,
            max_rows=trees.max_rows,
            scale=self.scale,
            splits=trees.splits,
            parts=trees.parts,
            window=max(self.sliding_window[0] + 1, 0),
            softcap=self.logits_soft_cap,
            k_scale=layer._k_scale,
            v_scale=layer._v_scale,
            sinks=self.sinks,
            own=(key, value) if rows.dense else None,
            tile=None if query.dtype == torch.float32 else self._half_tile,
        )


@functools.cache
def _metadata_class(stock: Any) -> Any:
    trees = ("trees", TreePass | None, field(default=None))
    return make_dataclass(f"Tree{stock.__name__}", [trees], bases=(stock,))


def _with_trees(metadata: Any, trees: TreePass) -> Any:
    stock: Any = type(metadata)
    values = {one.name: getattr(metadata, one.name) for one in fields(stock)}
    return _metadata_class(stock)(**values, trees=trees)


def tree_backend(stock: type[AttentionBackend]) -> Any:
    """A subclass of ``stock`` whose builder and attention know trees.

    It needs the cache in the layout of vLLM's FLASH_ATTN and TRITON_ATTN, [pages, heads, page size, 2 x head size] in
    any strides, and an implementation that does not write keys and values itself.
    """
    assert not stock.forward_includes_kv_cache_update
    # The stock classes are known at run time only.
    builder: Any = type(
        f"Tree{stock.get_builder_cls().__name__}", (TreeBuilder, stock.get_builder_cls()), {}
    )
    attention: Any = type(
        f"Tree{stock.get_impl_cls().__name__}", (TreeImpl, stock.get_impl_cls()), {}
    )
    members = {
        "get_builder_cls": staticmethod(lambda: builder),
        "get_impl_cls": staticmethod(lambda: attention),
    }
    return type(f"Tree{stock.__name__}", (stock,), members)
