# SPDX-License-Identifier: Apache-2.0
"""The scratch blocks of a worker's KV cache and what moves through them.

vLLM's cache tensors are allocated with some blocks more than its scheduler knows of. All layers lie in one
allocation at a constant stride, so copies and compaction are one call for all layers.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm import _custom_ops as ops
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

from vllm_hidden_transfer.tree import PathLayout, Scratch

IntArray = NDArray[np.int64]


def with_scratch_blocks(config: KVCacheConfig, num_scratch: int) -> KVCacheConfig:
    """The same cache with ``num_scratch`` blocks more at the end of every layer.

    Raises:
        ValueError: when layers are not laid out one after the other in one allocation.
    """
    if len(config.kv_cache_tensors) != 1 or len(config.kv_cache_groups) != 1:
        raise ValueError(
            "hidden_transfer needs one kind of KV cache for all layers, and this model has "
            f"{len(config.kv_cache_groups)} kinds: serve it without speculation"
        )
    (tensor,) = config.kv_cache_tensors
    page = tensor.block_stride
    if tensor.offset or tensor.layer_stride != page * config.num_blocks:
        raise ValueError(
            "hidden_transfer needs a KV cache layout with each layer's blocks side by side: "
            "leave the KV cache layout at its default"
        )
    num_blocks = config.num_blocks + num_scratch
    layer_stride = page * num_blocks
    larger = replace(tensor, layer_stride=layer_stride, size=layer_stride * len(tensor.layers))
    return replace(config, num_blocks=num_blocks, kv_cache_tensors=[larger])


def num_scratch_blocks(num_blocks: int, max_num_seqs: int, budget: int) -> int:
    """How many scratch blocks an engine gets: a block for every node of every request, but not more
    than an eighth of the cache, and always enough for four bushy trees."""
    return min(max_num_seqs * budget, max(num_blocks // 8, 4 * budget)) + 1


def blocks_beside_scratch(total: int, max_num_seqs: int, budget: int) -> int:
    """How many of ``total`` blocks can be the scheduler's, so that there is room for their scratch blocks too."""

    def together(num_blocks: int) -> int:
        return num_blocks + num_scratch_blocks(num_blocks, max_num_seqs, budget)

    return max(bisect.bisect_right(range(total + 1), total, key=together) - 1, 1)


def side_rows_bytes(
    specs: Iterable[KVCacheSpec], num_rows: int, max_num_batched_tokens: int, dtype: torch.dtype
) -> int:
    """What ``KVStore.saved_rows`` may grow to, in bytes.

    Args:
        specs: of each layer's cache.
        num_rows: nodes of the trees of all requests together.
        max_num_batched_tokens: rows of a pass at most.
        dtype: of keys and values before they are written.
    """
    numbers = sum(2 * spec.num_kv_heads * spec.head_size for spec in specs)
    return min(num_rows, max_num_batched_tokens) * numbers * dtype.itemsize


class KVStore:
    """All layers' caches as one tensor.

    Args:
        caches: of each layer, [num_blocks, num_kv_heads, block_size, 2 * head_size] (K and V of a block side by
            side in the layout of vLLM's CPU kernel, which only the kernel's own write op may interpret).
        scratch: the scratch blocks.
        layers: vLLM's attention layers by name; they know how keys and values are quantised.
    """

    def __init__(
        self, caches: Mapping[str, torch.Tensor], scratch: Scratch, layers: Mapping[str, Any]
    ) -> None:
        self.layer_names = list(caches)
        self._layers = [layers[name] for name in self.layer_names]
        self.layer_index = {name: index for index, name in enumerate(self.layer_names)}
        self.scratch = scratch
        first = caches[self.layer_names[0]]
        self.num_blocks, self.num_kv_heads, self.block_size, kv_size = first.shape
        self.head_size = kv_size // 2
        self._stack = _stacked(list(caches.values()))
        self._saved: torch.Tensor | None = None

    def copy_blocks(self, copy_from: IntArray, copy_to: IntArray) -> None:
        """Copy whole blocks in all layers."""
        for source, target in zip(copy_from.tolist(), copy_to.tolist(), strict=True):
            self._stack[:, target].copy_(self._stack[:, source])

    def saved_rows(self, num_rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Persistent room for keys and values of one pass, each [layers, num_rows, heads, head_size]."""
        size = 2 * len(self.layer_names) * num_rows * self.num_kv_heads * self.head_size
        if self._saved is None or self._saved.numel() < size or self._saved.dtype != dtype:
            self._saved = torch.empty(size, dtype=dtype)
        shape = (2, len(self.layer_names), num_rows, self.num_kv_heads, self.head_size)
        keys, values = self._saved[:size].view(shape)
        return keys, values

    def write(
        self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, isa: str
    ) -> None:
        """Write rows into the same slots of all layers.

        Args:
            keys, values: [layers, m, heads, head_size].
            slots: int64 [m].
        """
        num_layers = len(self.layer_names)
        flat = self._stack.view(num_layers * self.num_blocks, self.num_kv_heads, -1, self.head_size)
        key_cache, value_cache = flat.chunk(2, dim=2)
        layer_slots = torch.arange(num_layers)[:, None] * (self.num_blocks * self.block_size)
        all_slots = layer_slots + slots
        for (k_scale, v_scale, kv_cache_dtype), layers in self._by_scale().items():
            ops.cpu_attn_reshape_and_cache(
                keys[layers].flatten(0, 1),
                values[layers].flatten(0, 1),
                key_cache,
                value_cache,
                all_slots[layers].flatten(),
                isa,
                k_scale=k_scale,
                v_scale=v_scale,
                kv_cache_dtype=kv_cache_dtype,
            )

    def _by_scale(self) -> dict[tuple[float, float, str], list[int] | slice]:
        """Layers that quantise alike, which one call can write; all of them without an fp8 cache."""
        groups: dict[tuple[float, float, str], list[int]] = {}
        for index, layer in enumerate(self._layers):
            scale = (layer._k_scale_float, layer._v_scale_float, layer.impl.kv_cache_dtype)
            groups.setdefault(scale, []).append(index)
        if len(groups) == 1:  # a slice needs no copy of the rows
            return dict.fromkeys(groups, slice(None))
        return {**groups}

    def clear(self, slots: torch.Tensor, dtype: torch.dtype, isa: str) -> None:
        """Write zeros into the same slots of all layers."""
        zeros = torch.zeros(
            len(self.layer_names), len(slots), self.num_kv_heads, self.head_size, dtype=dtype
        )
        self.write(zeros, zeros, slots, isa)


def _stacked(caches: Sequence[torch.Tensor]) -> torch.Tensor:
    """One view [layers, ...] of caches that lie at a constant stride in one allocation."""
    first = caches[0]
    step = first.stride(0) * first.shape[0]
    for index, cache in enumerate(caches):
        if (
            cache.shape != first.shape
            or cache.stride() != first.stride()
            or cache.data_ptr() != first.data_ptr() + index * step * first.element_size()
        ):
            raise ValueError(
                "hidden_transfer needs the layers' KV caches at a constant stride in one allocation"
            )
    return torch.as_strided(
        first, (len(caches), *first.shape), (step, *first.stride()), first.storage_offset()
    )


@dataclass
class TreePass:
    """One verification pass on its way through the layers: what is written where, and the rows
    that compaction may need again."""

    layout: PathLayout
    store: KVStore
    dtype: torch.dtype

    def __post_init__(self) -> None:
        layout = self.layout
        self.rows = torch.from_numpy(layout.write_rows)
        self.slots = torch.from_numpy(layout.write_slots)
        self._side_rows = torch.from_numpy(layout.side_rows)
        self.keys, self.values = self.store.saved_rows(len(self._side_rows), self.dtype)
        self.store.copy_blocks(layout.copy_from, layout.copy_to)

    def save(
        self, layer_name: str, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's key and value rows in the order of the writes. Those off the first runs are kept for compaction.

        The model's own buffers are reused by compiled code, so what is kept is a copy.
        """
        layer = self.store.layer_index[layer_name]
        torch.index_select(key, 0, self._side_rows, out=self.keys[layer])
        torch.index_select(value, 0, self._side_rows, out=self.values[layer])
        return key.index_select(0, self.rows), value.index_select(0, self.rows)

    def compact(self, rows: IntArray, slots: IntArray, isa: str) -> None:
        """Write accepted rows off the first runs (int64 [m]) into their slots (int64 [m]), in all layers."""
        places = torch.from_numpy(np.searchsorted(self.layout.side_rows, rows))
        self.store.write(self.keys[:, places], self.values[:, places], torch.from_numpy(slots), isa)
