# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803
"""Which rows of a step are a row's ancestors, as bits, from the parents that slots keep on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def ancestor_words_kernel(
    words_ptr: tl.tensor,
    depths_ptr: tl.tensor,
    parents_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    num_drafts_ptr: tl.tensor,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
) -> None:
    """One program a request, one lane a row, which climbs to the root: as many turns as the tree is deep."""
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request)
    has_drafts = tl.load(num_drafts_ptr + request) > 0
    lanes = tl.arange(0, ROWS_PAD)
    row_at = request * ROWS + lanes
    one = tl.full([ROWS_PAD], 1, dtype=tl.int32)
    for word in tl.static_range(WORDS):
        current = tl.where(lanes < ROWS, lanes, 0)
        words = tl.zeros([ROWS_PAD], dtype=tl.int32)
        depths = tl.zeros([ROWS_PAD], dtype=tl.int32)
        while tl.max(current, axis=0) > 0:
            below = current > 0
            words = words | tl.where(below & (current // 32 == word), one << (current % 32), 0)
            depths = depths + below.to(tl.int32)
            parent_at = slot * (ROWS - 1) + current - 1
            parent = tl.load(parents_ptr + parent_at, mask=below, other=-1).to(tl.int32) + 1
            # A slot that nothing was written to must not keep the device turning for ever.
            parent = tl.minimum(parent, current - 1)
            current = tl.where(below, tl.where(has_drafts, parent, current - 1), 0)
        if word == 0:
            words = words | 1  # the root, which every row descends from
        tl.store(words_ptr + row_at * WORDS + word, words, mask=lanes < ROWS)
        tl.store(depths_ptr + row_at, depths, mask=lanes < ROWS)


def num_words(rows: int) -> int:
    """Ancestor words, of 32 bits each, that a row of a request of so many rows has."""
    return -(-rows // 32)


def write_ancestors(
    words: torch.Tensor,
    depths: torch.Tensor,
    parents: torch.Tensor,
    slots: torch.Tensor,
    num_drafts: torch.Tensor,
) -> None:
    """Write the ancestors and depths of R requests' rows to the first R places; all tensors are contiguous.

    A request without drafts in this step gets a chain, whatever its slot holds.

    Args:
        words: int32 [requests at most, rows, ``num_words(rows)``]; bit j % 32 of word j // 32 of row i says that row j
            is row i or an ancestor of it. Row 0 is the root, and node i is row i + 1.
        depths: int32 [requests at most, rows]: how far a row is from the root.
        parents: int64 [slots, rows - 1]: the parent of each node, -1 for a child of the root; no node comes before its
            parent.
        slots: int64 or int32 [R], each request's slot.
        num_drafts: int32 [R], nodes that are verified in this step.
    """
    rows = depths.shape[1]
    ancestor_words_kernel[(len(slots),)](
        words,
        depths,
        parents,
        slots,
        num_drafts,
        ROWS=rows,
        WORDS=words.shape[2],
        ROWS_PAD=triton.next_power_of_2(rows),
    )
