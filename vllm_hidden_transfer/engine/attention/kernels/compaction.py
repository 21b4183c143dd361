# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803
"""An accepted path's keys and values move to where decoding without speculation has them, in all layers at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def compact_kernel(
    pointers_ptr: tl.tensor,
    like_ptr: tl.tensor,
    step_slots_ptr: tl.tensor,
    roots_ptr: tl.tensor,
    path_rows_ptr: tl.tensor,
    num_accepted_ptr: tl.tensor,
    stride_page: tl.int64,
    stride_slot: tl.int64,
    stride_head: tl.int64,
    DEPTHS: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
) -> None:
    """One program for each (request, layer, KV head), which walks the depths upwards.

    In place is right because every parent comes before its children: the row of depth d is row d or a later one, so
    what is written at depth d was read before or is no part of the path.
    """
    request = tl.program_id(0)
    pointer = tl.load(pointers_ptr + tl.program_id(1))
    cache = pointer.to(tl.pointer_type(like_ptr.dtype.element_ty))
    head = tl.program_id(2)
    root = tl.load(roots_ptr + request)
    accepted = tl.load(num_accepted_ptr + request)
    dims = tl.arange(0, WIDTH_PAD)
    for depth in range(1, DEPTHS + 1):
        row = tl.load(path_rows_ptr + request * (DEPTHS + 1) + depth)
        if (depth <= accepted) & (row != depth):
            source = tl.load(step_slots_ptr + root + row)
            target = tl.load(step_slots_ptr + root + depth)
            source_at = (source // PAGE) * stride_page + (source % PAGE) * stride_slot
            target_at = (target // PAGE) * stride_page + (target % PAGE) * stride_slot
            head_at = head * stride_head + dims
            both = tl.load(cache + source_at + head_at, mask=dims < WIDTH)
            tl.store(cache + target_at + head_at, both, mask=dims < WIDTH)


def compact_paths(
    pointers: torch.Tensor,
    like: torch.Tensor,
    step_slots: torch.Tensor,
    roots: torch.Tensor,
    path_rows: torch.Tensor,
    num_accepted: torch.Tensor,
) -> None:
    """Move keys and values of accepted paths right behind their roots', in place, without waiting for the device.

    Args:
        pointers: int64 [layers], where the cache of each layer starts (``data_ptr``).
        like: the cache of one of these layers, [pages, KV heads, page size, keys and values] by any strides but a
            contiguous last dimension; all layers have its strides and dtype.
        step_slots: int64 [rows of the step], the slot (page * page size + place in it) that each row was written to.
        roots: int64 [R], the row of each request's root in the step.
        path_rows: int64 [R, D + 1], contiguous: the row of the request at each depth of its accepted path, 0 first;
            what stands behind the path moves nothing.
        num_accepted: int64 [R], accepted nodes.
    """
    _, kv_heads, page_size, width = like.shape
    # One warp: what a thread writes was then read by itself, or by a thread in step with it.
    compact_kernel[(len(roots), len(pointers), kv_heads)](
        pointers,
        like,
        step_slots,
        roots,
        path_rows,
        num_accepted,
        like.stride(0),
        like.stride(2),
        like.stride(1),
        DEPTHS=path_rows.shape[1] - 1,
        PAGE=page_size,
        WIDTH=width,
        WIDTH_PAD=triton.next_power_of_2(width),
        num_warps=1,
    )
