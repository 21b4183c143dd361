# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803
"""Attention of trees whose rows have the bits that they have without speculation, for VLLM_BATCH_INVARIANT=1.

Every row is a program of its own. Its keys stand in the order of their positions, the context and then its ancestors by
depth, in the tiles in which vLLM's Triton kernel takes them when it decodes batch-invariantly (vLLM 0.32.0,
``v1/attention/ops/triton_unified_attention.py``: 32 keys, no splits), and every operation is that kernel's. A tree
cannot be told from a chain by the result. The price is that each row reads the context anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_hidden_transfer.engine.attention.kernels.tree_attention import _keys_and_values

TILE = 32
"""Keys at a time; another number gives other bits."""


@triton.jit
def exact_rows_kernel(
    out_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    block_table_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    path_ptr: tl.tensor,
    depths_ptr: tl.tensor,
    scale: tl.float32,
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
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTHS: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program for each (request and row, KV head); a lane is a query head."""
    request = tl.program_id(0) // ROWS
    row = tl.program_id(0) % ROWS
    head = tl.program_id(1)
    start = tl.load(starts_ptr + request)
    n = tl.load(starts_ptr + request + 1) - start
    if (row >= n) | (n > ROWS):
        return
    # While vLLM captures a graph every sequence is one token long, which is shorter than its rows.
    context = tl.maximum(tl.load(seq_lens_ptr + request) - n, 0)
    length = context + tl.load(depths_ptr + request * ROWS + row) + 1
    lanes = tl.arange(0, BLOCK_M)
    q_head = head * GROUP + lanes
    live = lanes < GROUP
    dims = tl.arange(0, HEAD_PAD)
    dim_valid = dims < HEAD
    q_at = (start + row).to(tl.int64) * q_stride_row + q_head * q_stride_head
    lane_valid = live[:, None] & dim_valid[None, :]
    q = tl.load(q_ptr + q_at[:, None] + dims[None, :], mask=lane_valid, other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PAD], dtype=tl.float32)
    for tile in range(0, tl.cdiv(length, TILE)):
        position = tile * TILE + tl.arange(0, TILE)
        valid = position < length
        depth = position - context
        path_at = (request * ROWS + row) * DEPTHS + depth
        ancestor = tl.load(path_ptr + path_at, mask=valid & (depth >= 0), other=0)
        places = tl.where(depth >= 0, context + ancestor, position)
        keys, values = _keys_and_values(
            k_ptr,
            v_ptr,
            block_table_ptr + request * table_stride,
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
        # From here on stock's operations in stock's order: even a sum that starts from zeros.
        scores = tl.zeros([BLOCK_M, TILE], dtype=tl.float32)
        scores += scale * tl.dot(q, keys)
        scores = tl.where(live[:, None] & valid[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        new_top = tl.where(new_top > float("-inf"), new_top, 0.0)
        weights = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        top = new_top
        acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(values.dtype), values)
    acc = acc / total[:, None]
    out_at = (start + row).to(tl.int64) * out_stride_row + q_head * out_stride_head
    tl.store(out_ptr + out_at[:, None] + dims[None, :], acc, mask=lane_valid)


def exact_rows(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    path: torch.Tensor,
    depths: torch.Tensor,
    scale: float,
) -> None:
    """Attention of R requests' trees, to the bits of vLLM's Triton kernel on the chain of each row's ancestors.

    Without window, soft cap, sinks and fp8 caches. Prompt chunks (requests of more rows than ``depths`` has) are left
    alone: they are stock's. The other arguments are those of ``tree_attention.tree_attention``.

    Args:
        path: int32 [R, rows, depths], contiguous: which row is a row's ancestor at each depth up to its own: ``paths``.
        depths: int32 [R, rows], contiguous.
        scale: of scores.
    """
    heads, head_size = q.shape[1:]
    page_size, kv_heads = k_cache.shape[1:3]
    rows, group = depths.shape[1], heads // kv_heads
    exact_rows_kernel[(len(seq_lens) * rows, kv_heads)](
        out,
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        starts,
        path,
        depths,
        scale,
        *q.stride()[:2],
        *out.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_table.stride(0),
        GROUP=group,
        ROWS=rows,
        DEPTHS=path.shape[2],
        PAGE=page_size,
        HEAD=head_size,
        HEAD_PAD=triton.next_power_of_2(head_size),
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        TILE=TILE,
    )


def paths(parents: torch.Tensor, depths: torch.Tensor, has_drafts: torch.Tensor) -> torch.Tensor:
    """The row of each row's ancestor at each depth up to its own, int32 [R, rows, rows]; zeros beyond.

    Args:
        parents: int64 [R, rows - 1], of each node, -1 for a child of the root.
        depths: int32 [R, rows], as ``ancestors.write_ancestors`` has written them.
        has_drafts: bool [R]; a request without drafts is a chain.
    """
    requests, rows = depths.shape
    own = torch.arange(rows, device=depths.device)
    above = torch.where(has_drafts[:, None], parents + 1, own[:-1])
    above = torch.nn.functional.pad(above, (1, 0))
    path = torch.zeros(requests, rows, rows, dtype=torch.int64, device=depths.device)
    current = own.expand(requests, rows)
    for _ in range(rows):
        depth = depths.long().gather(1, current)
        path.scatter_(2, depth[..., None], current[..., None])
        current = above.gather(1, current)
    return path.int()
