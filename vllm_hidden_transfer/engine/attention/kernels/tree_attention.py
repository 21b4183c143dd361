# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803
"""Attention of trees over a paged cache: one kernel whose programs share the keys out, and one that joins their parts.

A request has n rows in a step: its root (the last sampled token) and the nodes of its tree, every parent before its
children. Row i sees the whole context and those of the step's rows whose bit is set in its ancestor words: bit j % 32
of word j // 32 says that row j is row i or an ancestor of it. A request of more rows than there are words is a chunk of
a prompt, where row i sees the rows up to i. Constants that a kernel is compiled for are in capitals, as Triton has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MAX_BLOCK_M = 128
"""Lanes of a block at most; with more, registers spill on every GPU it was compiled for."""
MAX_SPLITS = 32


@triton.jit
def _keys_and_values(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    head: tl.tensor,
    places: tl.tensor,
    valid: tl.tensor,
    dims: tl.tensor,
    dim_valid: tl.tensor,
    k_stride_page: tl.tensor,
    k_stride_slot: tl.tensor,
    k_stride_head: tl.tensor,
    v_stride_page: tl.tensor,
    v_stride_slot: tl.tensor,
    v_stride_head: tl.tensor,
    PAGE: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Keys [dims, places] and values [places, dims] of one head at places of a request; zeros where not valid."""
    page = tl.load(table_ptr + places // PAGE, mask=valid, other=0).to(tl.int64)
    slot = places % PAGE
    k_at = page * k_stride_page + slot * k_stride_slot + head * k_stride_head
    v_at = page * v_stride_page + slot * v_stride_slot + head * v_stride_head
    keys = tl.load(
        k_ptr + k_at[None, :] + dims[:, None], mask=valid[None, :] & dim_valid[:, None], other=0.0
    )
    values = tl.load(
        v_ptr + v_at[:, None] + dims[None, :], mask=valid[:, None] & dim_valid[None, :], other=0.0
    )
    return keys.to(DTYPE), values.to(DTYPE)


@triton.jit
def _attend(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    seen: tl.tensor,
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take a tile of keys into the running softmax, whose scores are in units of log 2."""
    scores = tl.dot(q, keys, input_precision=PRECISION) * scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which neither end of the range overflows.
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # A lane that saw nothing yet would subtract infinity from infinity.
    safe = tl.where(new_top > float("-inf"), new_top, 0.0)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None]
    acc += tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def tree_attention_kernel(
    out_ptr: tl.tensor,
    part_ptr: tl.tensor,
    part_top_ptr: tl.tensor,
    part_total_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    block_table_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    words_ptr: tl.tensor,
    depths_ptr: tl.tensor,
    own_k_ptr: tl.tensor,
    own_v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    scale: tl.float32,
    cap: tl.float32,
    row_blocks: tl.int32,
    q_stride_row: tl.int64,
    q_stride_head: tl.int64,
    out_stride_row: tl.int64,
    out_stride_head: tl.int64,
    k_stride_page: tl.int64,
    k_stride_slot: tl.int64,
    k_stride_head: tl.int64,
    v_stride_page: tl.int64,
    v_stride_slot: tl.int64,
    v_stride_head: tl.int64,
    table_stride: tl.int64,
    own_k_stride_row: tl.int64,
    own_k_stride_head: tl.int64,
    own_v_stride_row: tl.int64,
    own_v_stride_head: tl.int64,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
    SINKS: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One program for each (request and block of its rows, KV head, split); a lane is one query head of one row.

    The arguments are those of ``tree_attention``; ``scale`` and ``cap`` bring scores to units of log 2.
    """
    request = tl.program_id(0) // row_blocks
    block = tl.program_id(0) % row_blocks
    head = tl.program_id(1)
    split = tl.program_id(2)
    start = tl.load(starts_ptr + request)
    n = tl.load(starts_ptr + request + 1) - start
    if block * BLOCK_M >= n * GROUP:
        return
    # While vLLM captures a graph every sequence is one token long, which is shorter than its rows.
    context = tl.maximum(tl.load(seq_lens_ptr + request) - n, 0)
    is_chunk = n > ROWS
    tree_rows = tl.where(is_chunk, 0, n)

    lanes = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = lanes // GROUP
    q_head = head * GROUP + lanes % GROUP
    live = row < n
    dims = tl.arange(0, HEAD_PAD)
    dim_valid = dims < HEAD
    q_at = (start + row).to(tl.int64) * q_stride_row + q_head * q_stride_head
    q = tl.load(
        q_ptr + q_at[:, None] + dims[None, :], mask=live[:, None] & dim_valid[None, :], other=0.0
    )
    table = block_table_ptr + request * table_stride

    acc = tl.zeros([BLOCK_M, HEAD_PAD], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + q_head, mask=live, other=0.0).to(tl.float32) * LOG2E
        top = tl.where(split == SPLITS - 1, sink, top)
        total += tl.where(split == SPLITS - 1, 1.0, 0.0)
    v_factor = 1.0
    if FP8:
        scale = scale * tl.load(k_scale_ptr)
        v_factor = tl.load(v_scale_ptr)

    depth = row
    if WINDOW > 0:
        depth_at = request * ROWS + tl.minimum(row, ROWS - 1)
        depth = tl.where(is_chunk, row, tl.load(depths_ptr + depth_at, mask=live, other=0))

    # The context: every row sees all of it, or what its window holds of it.
    first_place = 0
    if WINDOW > 0:
        # Pages below belong to others by now: what stands there must not even be multiplied by zero.
        first_row = tl.where(is_chunk, block * BLOCK_M // GROUP, 0)
        first_place = tl.maximum(context + first_row - WINDOW + 1, 0)
    first_tile = first_place // TILE
    num_tiles = tl.maximum(tl.cdiv(context, TILE) - first_tile, 0)
    per_split = tl.cdiv(num_tiles, SPLITS)
    low = first_tile + split * per_split
    high = tl.minimum(low + per_split, first_tile + num_tiles)
    for tile in range(low, high):
        places = tile * TILE + tl.arange(0, TILE)
        valid = (places >= first_place) & (places < context)
        keys, values = _keys_and_values(
            k_ptr,
            v_ptr,
            table,
            head,
            places,
            valid,
            dims,
            dim_valid,
            k_stride_page,
            k_stride_slot,
            k_stride_head,
            v_stride_page,
            v_stride_slot,
            v_stride_head,
            PAGE,
            q.dtype,
        )
        seen = valid[None, :] & live[:, None]
        if WINDOW > 0:
            seen = seen & ((context + depth)[:, None] - places[None, :] < WINDOW)
        acc, top, total = _attend(
            q, keys, values, seen, acc, top, total, scale, cap, SOFTCAP, PRECISION
        )

    # The step's own rows, 32 at a time: one ancestor word a lane.
    if split == SPLITS - 1:
        last_row = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP + 1, n)
        num_others = tl.where(is_chunk, last_row, n)
        for word in range(0, tl.cdiv(num_others, 32)):
            others = word * 32 + tl.arange(0, 32)
            valid = others < num_others
            if DENSE:
                token = (start + others).to(tl.int64)
                k_at = token * own_k_stride_row + head * own_k_stride_head
                v_at = token * own_v_stride_row + head * own_v_stride_head
                keys = tl.load(
                    own_k_ptr + k_at[None, :] + dims[:, None],
                    mask=valid[None, :] & dim_valid[:, None],
                    other=0.0,
                )
                values = tl.load(
                    own_v_ptr + v_at[:, None] + dims[None, :],
                    mask=valid[:, None] & dim_valid[None, :],
                    other=0.0,
                )
            else:
                keys, values = _keys_and_values(
                    k_ptr,
                    v_ptr,
                    table,
                    head,
                    context + others,
                    valid,
                    dims,
                    dim_valid,
                    k_stride_page,
                    k_stride_slot,
                    k_stride_head,
                    v_stride_page,
                    v_stride_slot,
                    v_stride_head,
                    PAGE,
                    q.dtype,
                )
            word_at = (request * ROWS + row) * WORDS + word
            bits = tl.load(words_ptr + word_at, mask=row < tree_rows, other=0)
            is_ancestor = ((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1) != 0
            is_before = others[None, :] <= row[:, None]
            seen = tl.where(is_chunk, is_before, is_ancestor) & valid[None, :] & live[:, None]
            if WINDOW > 0:
                other_at = request * ROWS + tl.minimum(others, ROWS - 1)
                other_depth = tl.load(depths_ptr + other_at, mask=others < tree_rows, other=0)
                other_depth = tl.where(is_chunk, others, other_depth)
                seen = seen & (depth[:, None] - other_depth[None, :] < WINDOW)
            acc, top, total = _attend(
                q, keys, values, seen, acc, top, total, scale, cap, SOFTCAP, PRECISION
            )

    if SPLITS == 1:
        acc = acc / tl.where(total > 0.0, total, 1.0)[:, None] * v_factor
        out_at = (start + row).to(tl.int64) * out_stride_row + q_head * out_stride_head
        tl.store(
            out_ptr + out_at[:, None] + dims[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=live[:, None] & dim_valid[None, :],
        )
    else:
        part = ((start + row).to(tl.int64) * HEADS + q_head) * SPLITS + split
        part_at = part[:, None] * HEAD_PAD + dims[None, :]
        tl.store(part_ptr + part_at, acc * v_factor, mask=live[:, None])
        tl.store(part_top_ptr + part, top, mask=live)
        tl.store(part_total_ptr + part, total, mask=live)


@triton.jit
def join_splits_kernel(
    out_ptr: tl.tensor,
    part_ptr: tl.tensor,
    part_top_ptr: tl.tensor,
    part_total_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    max_rows: tl.int32,
    out_stride_row: tl.int64,
    out_stride_head: tl.int64,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """One program for each (row of a request, query head): the parts of its splits become its output."""
    request = tl.program_id(0) // max_rows
    row = tl.program_id(0) % max_rows
    head = tl.program_id(1)
    start = tl.load(starts_ptr + request)
    if row >= tl.load(starts_ptr + request + 1) - start:
        return
    dims = tl.arange(0, HEAD_PAD)
    part = ((start + row).to(tl.int64) * HEADS + head) * SPLITS + tl.arange(0, SPLITS)
    top = tl.load(part_top_ptr + part)
    best = tl.max(top, axis=0)
    best = tl.where(best > float("-inf"), best, 0.0)
    share = tl.exp2(top - best)
    total = tl.sum(tl.load(part_total_ptr + part) * share, axis=0)
    parts = tl.load(part_ptr + part[:, None] * HEAD_PAD + dims[None, :])
    joined = tl.sum(parts * share[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    out_at = (start + row).to(tl.int64) * out_stride_row + head * out_stride_head
    tl.store(out_ptr + out_at + dims, joined.to(out_ptr.dtype.element_ty), mask=dims < HEAD)


def choose_block_m(rows: int, group: int) -> int:
    """Lanes of a block: all rows of a request in as few blocks as may be, since each reads the context anew.

    Args:
        rows: of a request.
        group: query heads of a KV head.
    """
    return max(16, min(MAX_BLOCK_M, triton.next_power_of_2(rows * group)))


def choose_splits(num_requests: int, row_blocks: int, kv_heads: int, units: int) -> int:
    """Into how many programs the keys of a block are shared out: for two waves of programs, a power of two.

    Args:
        num_requests: of the batch, or of the graph that is captured.
        row_blocks: blocks of rows of a request.
        kv_heads: of this rank.
        units: multiprocessors of the GPU.
    """
    wanted = max(1, 2 * units // max(1, num_requests * row_blocks * kv_heads))
    return min(MAX_SPLITS, 1 << (wanted.bit_length() - 1))


@dataclass(frozen=True)
class Parts:
    """Room for what the splits of T rows make, which ``join_splits_kernel`` joins; contiguous."""

    values: torch.Tensor
    """fp32 [T, heads, splits, head size rounded up to a power of two]: sums of values by weights, not yet divided."""
    tops: torch.Tensor
    """fp32 [T, heads, splits]: the largest score, in units of log 2."""
    totals: torch.Tensor
    """fp32 [T, heads, splits]: the sum of weights."""

    @classmethod
    def empty(
        cls, rows: int, heads: int, splits: int, head_size: int, device: torch.device
    ) -> Parts:
        """Room whose content nothing is known of."""
        shape = (rows, heads, splits)
        head_pad = triton.next_power_of_2(head_size)
        return cls(
            torch.empty(*shape, head_pad, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    words: torch.Tensor,
    depths: torch.Tensor,
    *,
    max_rows: int,
    scale: float,
    splits: int = 1,
    parts: Parts | None = None,
    window: int = 0,
    softcap: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    own: tuple[torch.Tensor, torch.Tensor] | None = None,
    tile: int | None = None,
    block_m: int | None = None,
    num_warps: int | None = None,
    num_stages: int = 2,
) -> None:
    """Attention of R requests' rows, without waiting for the device and without reading the host's lengths.

    The step's keys and values are in the cache already, at the places context to context + n - 1 of each request's
    block table, in the order of its rows. A request of no rows is left alone, and so are rows behind those
    of the last request.

    Args:
        q: [T, heads, head size], fp32, bf16 or fp16; the last dimension is contiguous, here and in ``out`` and caches.
        k_cache: [pages, page size, KV heads, head size] by any strides, of q's dtype or fp8.
        v_cache: as ``k_cache``.
        out: as ``q``; written.
        block_table: int32 [R, pages of a request at most].
        seq_lens: int32 [R], context and rows.
        starts: int32 [R + 1], where each request's rows start in ``q``.
        words: int32 [R, rows, words], contiguous: see ``ancestors.write_ancestors``, and ``depths`` too.
        depths: int32 [R, rows], contiguous: how far behind the root a row's position is. Read where there is a window.
        max_rows: of a request in this step, prompt chunks included.
        scale: of scores.
        splits: programs that share the keys of a block, a power of two; see ``choose_splits``.
        parts: room for at least T rows of so many splits, where there are more than one.
        window: positions that a row sees, its own included; 0 is all.
        softcap: scores become softcap * tanh(scores / softcap); 0 leaves them alone.
        k_scale: fp32 [1], by which keys of an fp8 cache are multiplied.
        v_scale: as ``k_scale``, for values.
        sinks: [heads], scores beside those of the keys, whose values are zero.
        own: keys and values [T, KV heads, head size] of q's dtype to be read for the step's rows instead of the cache,
            which then need not hold them: a draft pass writes nothing.
        tile: keys that a program takes at a time, a power of two from 16 on; 64 by default, 16 for fp32 (registers).
        block_m: lanes of a block, a power of two from 16 on; ``choose_block_m`` by default.
        num_warps: of a program; 8 for 128 lanes and 4 for fewer by default.
        num_stages: tiles that are on their way at a time.

    Raises:
        ValueError: where ``parts`` does not fit ``splits``, or an fp8 cache has no scales.
    """
    heads, head_size = q.shape[1:]
    page_size, kv_heads = k_cache.shape[1:3]
    rows, num_words = words.shape[1:]
    group = heads // kv_heads
    is_fp8 = k_cache.element_size() == 1
    if splits > 1 and (parts is None or parts.tops.shape[1:] != (heads, splits)):
        raise ValueError(f"{splits} splits of {heads} heads need parts of that shape")
    if is_fp8 and (k_scale is None or v_scale is None):
        raise ValueError("an fp8 cache needs k_scale and v_scale")
    block_m = block_m or choose_block_m(max_rows, group)
    row_blocks = triton.cdiv(max_rows * group, block_m)
    room = (parts.values, parts.tops, parts.totals) if parts else (out, out, out)
    # What a kernel does not read is any pointer.
    own_k, own_v = own or (q, q)
    log_scale = scale * (2.0 / softcap if softcap else 1.0) * LOG2E.value
    tree_attention_kernel[(len(seq_lens) * row_blocks, kv_heads, splits)](
        out,
        *room,
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        starts,
        words,
        depths,
        own_k,
        own_v,
        k_scale if is_fp8 else q,
        v_scale if is_fp8 else q,
        q if sinks is None else sinks,
        log_scale,
        softcap * LOG2E.value,
        row_blocks,
        *q.stride()[:2],
        *out.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_table.stride(0),
        *own_k.stride()[:2],
        *own_v.stride()[:2],
        HEADS=heads,
        GROUP=group,
        ROWS=rows,
        WORDS=num_words,
        PAGE=page_size,
        HEAD=head_size,
        HEAD_PAD=triton.next_power_of_2(head_size),
        BLOCK_M=block_m,
        TILE=tile or (16 if q.dtype == torch.float32 else 64),
        SPLITS=splits,
        WINDOW=window,
        SOFTCAP=softcap > 0,
        FP8=is_fp8,
        SINKS=sinks is not None,
        DENSE=own is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=num_warps or (8 if block_m >= MAX_BLOCK_M else 4),
        num_stages=num_stages,
    )
    if splits > 1:
        join_splits_kernel[(len(seq_lens) * max_rows, heads)](
            out,
            *room,
            starts,
            max_rows,
            *out.stride()[:2],
            HEADS=heads,
            HEAD=head_size,
            HEAD_PAD=triton.next_power_of_2(head_size),
            SPLITS=splits,
        )
