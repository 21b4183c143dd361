# SPDX-License-Identifier: Apache-2.0
"""Path decomposition: a batch of trees as plain causal sequences over a paged KV cache.

Every run of a tree (see ``TokenTree.run_starts``) becomes a sequence of its own, whose queries are the run's rows
and whose keys are the prefix and the run's ancestors. An ordinary causal kernel then computes tree attention as it
computes decoding without speculation, up to how it adds for another number of rows. A first run lies in the request's
own blocks; any other run reads the prefix from the request's full blocks and continues in scratch blocks, whose first
is a copy of the request's partial block. numpy only, no vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from vllm_hidden_transfer.tree.build import limit_runs
from vllm_hidden_transfer.tree.token_tree import TokenTree

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class PathLayout:
    """One verification pass as causal sequences. s sequences, w written rows, c copied blocks."""

    query_starts: IntArray
    """int64 [s + 1]: the rows of each sequence's queries; they follow one another without gaps."""
    seq_lens: IntArray
    """int64 [s]: keys of each sequence, its own queries included."""
    block_table: IntArray
    """int64 [s, width]: the blocks of each sequence; unused entries are 0."""
    write_rows: IntArray
    """int64 [w]: the rows whose key and value are written, a row once for each sequence that reads it."""
    write_slots: IntArray
    """int64 [w]: block * block_size + offset of each write."""
    copy_from: IntArray
    """int64 [c]: blocks to copy before the writes."""
    copy_to: IntArray
    """int64 [c]: the scratch blocks that they are copied to."""
    first_write: IntArray
    """int64 [rows]: the place in ``write_rows`` of the first write of each row."""


def scratch_blocks_of_run(num_rows: int, first_position: int, block_size: int) -> int:
    """Scratch blocks that a run needs, other than a first one.

    Args:
        num_rows: rows on the run's path, the root's row (and any row before it in this pass) included.
        first_position: the position of the first of them.
    """
    return -(-(first_position % block_size + num_rows) // block_size)


def lay_out_paths(
    trees: Sequence[TokenTree | None],
    query_starts: IntArray,
    first_positions: IntArray,
    block_table: NDArray[np.int32],
    block_size: int,
    scratch: range,
) -> PathLayout:
    """Lay out one verification pass.

    Args:
        trees: of each request, None for rows in plain order (prefill, or decoding without drafts). The rows of a
            tree of n nodes are the last n + 1 of its request, the root's first.
        query_starts: int64 [requests + 1], each request's rows.
        first_positions: int64 [requests], the position of each request's first row.
        block_table: int32 [requests, width], each request's own blocks.
        block_size: tokens in a block.
        scratch: ids of the scratch blocks.

    Raises:
        ValueError: when the runs need more scratch blocks than there are.
    """
    free = iter(scratch)
    starts: list[int] = []
    lengths: list[int] = []
    tables: list[IntArray] = []
    rows: list[IntArray] = []
    slots: list[IntArray] = []
    copies: list[tuple[int, int]] = []

    def add_run(start: int, table: IntArray, seq_len: int, new_rows: IntArray) -> None:
        positions = np.arange(seq_len - len(new_rows), seq_len)
        starts.append(start)
        lengths.append(seq_len)
        tables.append(table)
        rows.append(new_rows)
        slots.append(table[positions // block_size] * block_size + positions % block_size)

    for request, tree in enumerate(trees):
        begin, end = int(query_starts[request]), int(query_starts[request + 1])
        num_nodes = 0 if tree is None else len(tree)
        root_row = end - 1 - num_nodes
        first_position = int(first_positions[request])
        run_starts = [0] if tree is None else tree.run_starts.tolist()
        run_ends = [*run_starts[1:], num_nodes + 1]
        own = block_table[request].astype(np.int64)

        first_rows = np.arange(begin, root_row + run_ends[0])
        seq_len = first_position + len(first_rows)
        add_run(begin, own[: -(-seq_len // block_size)], seq_len, first_rows)

        shared = first_position // block_size
        for start, stop in zip(run_starts[1:], run_ends[1:], strict=True):
            assert tree is not None
            path = tree.path(stop - 2) + 1 + root_row
            path_rows = np.concatenate([np.arange(begin, root_row + 1), path])
            need = scratch_blocks_of_run(len(path_rows), first_position, block_size)
            tail = list(islice(free, need))
            if len(tail) < need:
                raise ValueError(
                    f"the trees of this pass need more than its {len(scratch)} scratch blocks"
                )
            if first_position % block_size:
                copies.append((int(own[shared]), tail[0]))
            table = np.concatenate([own[:shared], np.array(tail, dtype=np.int64)])
            add_run(root_row + start, table, first_position + len(path_rows), path_rows)

    write_rows = np.concatenate(rows)
    _, first_write = np.unique(write_rows, return_index=True)
    table_array = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    for sequence, table in enumerate(tables):
        table_array[sequence, : len(table)] = table
    copy_array = np.array(copies, dtype=np.int64).reshape(-1, 2)
    return PathLayout(
        query_starts=np.array([*starts, int(query_starts[len(trees)])], dtype=np.int64),
        seq_lens=np.array(lengths, dtype=np.int64),
        block_table=table_array,
        write_rows=write_rows,
        write_slots=np.concatenate(slots),
        copy_from=copy_array[:, 0],
        copy_to=copy_array[:, 1],
        first_write=first_write,
    )


def fit_to_scratch(
    trees: Sequence[TokenTree],
    first_positions: Sequence[int],
    block_size: int,
    num_scratch: int,
) -> list[TokenTree]:
    """Cut runs off trees so that any subset of them fits the scratch blocks of one pass.

    Where all trees together need too much, each gets an equal share of the blocks.

    Args:
        trees: of each request.
        first_positions: the position of each request's root in the pass to come.
    """
    needs = [
        _scratch_need(tree, first, block_size)
        for tree, first in zip(trees, first_positions, strict=True)
    ]
    if sum(sum(need) for need in needs) <= num_scratch:
        return list(trees)
    share = num_scratch // len(trees)
    return [
        limit_runs(tree, 1 + int((np.cumsum(need) <= share).sum()))
        for tree, need in zip(trees, needs, strict=True)
    ]


def _scratch_need(tree: TokenTree, first_position: int, block_size: int) -> list[int]:
    """Scratch blocks of each run after the first."""
    ends = [*tree.run_starts.tolist()[1:], len(tree) + 1][1:]
    return [
        scratch_blocks_of_run(int(tree.depths[end - 2]) + 1, first_position, block_size)
        for end in ends
    ]
