# SPDX-License-Identifier: Apache-2.0
"""One layer's tree attention at shapes of an 8B Llama, to be launched with any splits and tiles. Imports no vLLM."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import common  # noqa: F401  finds the project
import numpy as np
import torch

from tests.support.kernel_cases import random_parents
from vllm_hidden_transfer.engine.attention.kernels.ancestors import num_words, write_ancestors
from vllm_hidden_transfer.engine.attention.kernels.tree_attention import (
    MAX_BLOCK_M,
    MAX_SPLITS,
    Parts,
    choose_block_m,
    choose_splits,
    tree_attention,
)

PAGE = 16
ENOUGH = 160 << 20
"""Bytes that no GPU's cache holds: launches go round over as many."""
MOST_COPIES = 32
TILES = ((32, 4, 3), (64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 8, 2))
"""Keys of a tile, warps and stages."""


@dataclass(frozen=True)
class Layer:
    """What attention sees of a model."""

    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype


LLAMA_8B = Layer(32, 8, 128, torch.bfloat16)
TINY = Layer(4, 2, 32, torch.float32)


@dataclass(frozen=True)
class Variant:
    """How a launch is cut."""

    splits: int
    tile: int
    warps: int
    stages: int


def default_variant(layer: Layer, requests: int, nodes: int, units: int) -> Variant:
    """What the engine launches; units: multiprocessors."""
    rows, group = nodes + 1, layer.heads // layer.kv_heads
    block_m = choose_block_m(rows, group)
    blocks = -(-rows * group // block_m)
    splits = choose_splits(requests, blocks, layer.kv_heads, units)
    tile = 16 if layer.dtype == torch.float32 else 64
    return Variant(splits, tile, 8 if block_m >= MAX_BLOCK_M else 4, 2)


def variants(layer: Layer, nodes: int) -> list[Variant]:
    """All that are swept."""
    splits = [2**power for power in range(MAX_SPLITS.bit_length())]
    wide = choose_block_m(nodes + 1, layer.heads // layer.kv_heads) >= MAX_BLOCK_M
    # 128 lanes spill with 4 warps: compiled, and seen without a GPU.
    tiles = [tile for tile in TILES if tile[1] == 8 or not wide]
    return [Variant(one, *tile) for one, tile in itertools.product(splits, tiles)]


class Bench:
    """A step of some requests with full trees, in several places of one cache.

    Args:
        layer: the model's.
        requests: R.
        context: tokens of each before its root.
        nodes: K.
        device: where.
    """

    def __init__(self, layer: Layer, requests: int, context: int, nodes: int, device: str) -> None:
        self.layer, self.nodes, self.requests = layer, nodes, requests
        rows = nodes + 1
        self.length = context + rows
        pages = -(-self.length // PAGE)
        width = layer.kv_heads * 2 * layer.head_size
        self.bytes = requests * self.length * width * layer.dtype.itemsize
        """Of keys and values that a launch reads at least."""
        copies = 1 if device == "cpu" else min(MOST_COPIES, max(4, -(-ENOUGH // self.bytes)))
        if self.bytes >= ENOUGH:
            copies = 1
        shape = (copies * requests * pages, PAGE, layer.kv_heads, 2 * layer.head_size)
        cache = torch.randn(shape, device=device, dtype=layer.dtype)
        self.keys, self.values = cache.split(layer.head_size, -1)
        # A multiple of 16 columns whatever the context: Triton compiles anew for another kind of stride.
        self.tables = torch.zeros(
            copies, requests, -(-pages // 16) * 16, dtype=torch.int32, device=device
        )
        order = torch.randperm(shape[0], device=device).int()
        self.tables[:, :, :pages] = order.view(copies, requests, pages)
        self.q = torch.randn(
            requests * rows, layer.heads, layer.head_size, device=device, dtype=layer.dtype
        )
        self.seq_lens = torch.full((requests,), self.length, dtype=torch.int32, device=device)
        self.starts = torch.arange(0, requests * rows + 1, rows, dtype=torch.int32, device=device)
        self.words = torch.zeros(requests, rows, num_words(rows), dtype=torch.int32, device=device)
        self.depths = torch.zeros(requests, rows, dtype=torch.int32, device=device)
        rng = np.random.default_rng(nodes)
        parents = [random_parents(rng, nodes) for _ in range(requests)]
        self._write(torch.tensor(parents, device=device))

    @property
    def scale(self) -> float:
        return self.layer.head_size**-0.5

    def make_chains(self) -> None:
        """Every tree becomes a chain, which stock's kernels know too."""
        chain = torch.arange(-1, self.nodes - 1, device=self.q.device)
        self._write(chain.expand(self.requests, -1).contiguous())

    def _write(self, parents: torch.Tensor) -> None:
        slots = torch.arange(self.requests, device=self.q.device)
        drafts = torch.full_like(slots, self.nodes).int()
        write_ancestors(self.words, self.depths, parents, slots, drafts)

    def launches(self, variant: Variant, out: torch.Tensor) -> list[Callable[[], None]]:
        """One launch for each place in the cache; out: as q."""
        layer, splits = self.layer, variant.splits
        parts = None
        if splits > 1:
            parts = Parts.empty(len(self.q), layer.heads, splits, layer.head_size, self.q.device)
        return [
            functools.partial(
                tree_attention,
                self.q,
                self.keys,
                self.values,
                out,
                table,
                self.seq_lens,
                self.starts,
                self.words,
                self.depths,
                max_rows=self.nodes + 1,
                scale=self.scale,
                splits=splits,
                parts=parts,
                tile=variant.tile,
                num_warps=variant.warps,
                num_stages=variant.stages,
            )
            for table in self.tables
        ]
