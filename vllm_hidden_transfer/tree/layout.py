# SPDX-License-Identifier: Apache-2.0
"""Path decomposition: a batch of trees as plain causal sequences over a paged KV cache.

Every run of a tree (see ``TokenTree.run_starts``) becomes a sequence of its own, whose queries are the run's rows
and whose keys are the prefix and the run's ancestors. An ordinary causal kernel then computes tree attention as it
computes decoding without speculation, up to how it adds for another number of rows. A first run lies in the request's
own blocks; any other run reads the prefix from the request's full blocks and continues in scratch blocks, whose first
is a copy of the request's partial block. Rows of nodes that were cut after they had been scheduled are a sequence too,
which sees itself only. numpy only, no vLLM; no loop over requests, because this runs in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_hidden_transfer.tree.token_tree import ROOT, TokenTree

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class PathLayout:
    """One verification pass as causal sequences. s sequences, w writes, c copied blocks, m rows off the first runs."""

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
    side_rows: IntArray
    """int64 [m], ascending: rows of nodes off the first runs, which may have to be moved when they are accepted."""


@dataclass(frozen=True)
class Scratch:
    """Blocks behind the scheduler's own, free at the start of every pass."""

    blocks: range
    """What side runs and draft rows continue in."""
    spill: int
    """One block for keys and values that nobody else reads; they are finite, and meaningless."""


@dataclass(frozen=True)
class _Nodes:
    """The nodes of a batch of trees behind one another, and their runs off the first. N nodes, r side runs."""

    offsets: IntArray
    """int64 [requests + 1]: where each request's nodes begin."""
    parents: IntArray
    """int64 [N]: places in these arrays, ``ROOT`` for a child of the root."""
    depths: IntArray
    """int64 [N]."""
    starts: IntArray
    """int64 [r]: the first node of each side run."""
    ends: IntArray
    """int64 [r]: behind its last."""
    requests: IntArray
    """int64 [r]: its request."""

    @classmethod
    def of(cls, trees: Sequence[TokenTree | None]) -> _Nodes:
        sizes = np.array([0 if tree is None else len(tree) for tree in trees], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        real = [tree for tree in trees if tree is not None]
        local = _joined([tree.parents for tree in real])
        shift = np.repeat(offsets[:-1], sizes)
        here = np.arange(len(local)) - shift
        starts = np.flatnonzero(local != here - 1)
        owners = np.searchsorted(offsets, starts, side="right") - 1
        ends = np.minimum(np.append(starts[1:], len(local)), offsets[owners + 1])
        parents = np.where(local == ROOT, ROOT, local + shift)
        depths = _joined([tree.depths for tree in real])
        return cls(offsets, parents, depths, starts, ends, owners)

    def path_lens_and_needs(
        self, first_positions: IntArray, rows_before: IntArray, block_size: int
    ) -> tuple[IntArray, IntArray]:
        """Of each side run, int64 [r]: the rows on its path with those up to the root's, and the scratch blocks that
        these take, which begin with a copy of the request's partial block."""
        of = self.requests
        path_lens = rows_before[of] + self.depths[self.ends - 1]
        return path_lens, -(-(first_positions[of] % block_size + path_lens) // block_size)

    def paths(self) -> IntArray:
        """int64 [r, deepest]: the nodes on each side run's path from the root's child down; -1 beyond its end."""
        last = self.ends - 1
        deepest = int(self.depths[last].max(initial=0))
        found = np.full((len(last), deepest), -1, dtype=np.int64)
        runs, node = np.arange(len(last)), last
        while len(runs):
            found[runs, self.depths[node] - 1] = node
            node = self.parents[node]
            runs, node = runs[node != ROOT], node[node != ROOT]
        return found


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def ramp(lengths: IntArray) -> tuple[IntArray, IntArray]:
    """For groups of these sizes behind one another: each entry's group, and its place in it."""
    group = np.repeat(np.arange(len(lengths)), lengths)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _slots(table: IntArray, group: IntArray, positions: IntArray, block_size: int) -> IntArray:
    return table[group, positions // block_size] * block_size + positions % block_size


def lay_out_paths(
    trees: Sequence[TokenTree | None],
    root_rows: IntArray,
    query_starts: IntArray,
    first_positions: IntArray,
    block_table: NDArray[np.int32],
    block_size: int,
    scratch: Scratch,
) -> PathLayout:
    """Lay out one verification pass.

    Args:
        trees: of each request, None for rows in plain order (prefill, or decoding without drafts).
        root_rows: int64 [requests], the row of each request's root; its nodes follow. Rows behind those belong to
            nodes that were cut.
        query_starts: int64 [requests + 1], each request's rows.
        first_positions: int64 [requests], the position of each request's first row.
        block_table: int32 [requests, width], each request's own blocks.
        block_size: tokens in a block.
        scratch: blocks for this pass.

    Raises:
        ValueError: when the runs need more scratch blocks than there are (see ``fit_to_scratch``).
    """
    nodes = _Nodes.of(trees)
    begins, ends = query_starts[:-1], query_starts[1:]
    before = root_rows - begins + 1
    # First runs, one for each request.
    first_ends = nodes.offsets[1:].copy()
    np.minimum.at(first_ends, nodes.requests, nodes.starts)
    first_counts = before + first_ends - nodes.offsets[:-1]
    first_lens = first_positions + first_counts
    # Side runs.
    of = nodes.requests
    path_lens, needs = nodes.path_lens_and_needs(first_positions, before, block_size)
    if needs.sum() > len(scratch.blocks):
        raise ValueError(
            f"the trees of this pass need {needs.sum()} scratch blocks and there are {len(scratch.blocks)}"
        )
    side_lens = first_positions[of] + path_lens
    side_starts = root_rows[of] + 1 + nodes.starts - nodes.offsets[of]
    # Rows of nodes that were cut.
    dead_starts = root_rows + 1 + nodes.offsets[1:] - nodes.offsets[:-1]
    cut = np.flatnonzero(dead_starts < ends)
    dead_counts = (ends - dead_starts)[cut]

    seq_lens = np.concatenate([first_lens, side_lens, dead_counts])
    starts = np.concatenate([begins, side_starts, dead_starts[cut]])
    width = -(-int(seq_lens.max()) // block_size)
    columns = np.arange(width)
    own = np.zeros((len(trees), width), dtype=np.int64)
    known = min(width, block_table.shape[1])
    own[:, :known] = block_table[:, :known]
    first_table = np.where(columns < -(-first_lens[:, None] // block_size), own, 0)
    shared = (first_positions // block_size)[of]
    tails = scratch.blocks.start + np.cumsum(needs) - needs
    behind = columns - shared[:, None]
    side_table = np.where(
        behind < 0, own[of], np.where(behind < needs[:, None], tails[:, None] + behind, 0)
    )
    dead_table = np.where(columns < -(-dead_counts[:, None] // block_size), scratch.spill, 0)

    first, place = ramp(first_counts)
    first_rows = begins[first] + place
    first_slots = _slots(first_table, first, first_positions[first] + place, block_size)
    run, place = ramp(path_lens)
    on_path = place - before[of][run]
    path = nodes.paths() - nodes.offsets[of][:, None]
    side_rows = begins[of][run] + place
    inside = on_path >= 0
    side_rows[inside] = (root_rows[of][run] + 1)[inside] + path[run[inside], on_path[inside]]
    side_slots = _slots(side_table, run, first_positions[of][run] + place, block_size)
    dead, place = ramp(dead_counts)
    dead_rows = dead_starts[cut][dead] + place
    dead_slots = _slots(dead_table, dead, place, block_size)

    order = np.argsort(starts, kind="stable")
    run, place = ramp(nodes.ends - nodes.starts)
    partial = first_positions[of] % block_size > 0
    return PathLayout(
        query_starts=np.append(starts[order], query_starts[-1]),
        seq_lens=seq_lens[order],
        block_table=np.concatenate([first_table, side_table, dead_table])[order],
        write_rows=np.concatenate([first_rows, side_rows, dead_rows]),
        write_slots=np.concatenate([first_slots, side_slots, dead_slots]),
        copy_from=own[of, shared][partial] if len(of) else np.zeros(0, dtype=np.int64),
        copy_to=tails[partial],
        side_rows=side_starts[run] + place,
    )


def fit_to_scratch(
    trees: Sequence[TokenTree | None],
    first_positions: IntArray,
    rows_before: IntArray,
    block_size: int,
    num_scratch: int,
) -> list[TokenTree | None]:
    """Cut side runs off trees so that one pass has scratch blocks for all of them.

    Where they need too much, runs go in the order of what a block of theirs is worth: the path probabilities of their
    nodes, whose sum is the expected number of accepted drafts. A run never stays without those before it in its tree.

    Args:
        trees: of each request; one without log-probabilities counts as if each child had half of its parent's.
        first_positions: int64 [requests], the position of each request's first row in the pass.
        rows_before: int64 [requests], its rows in the pass up to the root's, that one included.
        block_size: tokens in a block.
        num_scratch: scratch blocks of one pass.
    """
    nodes = _Nodes.of(trees)
    of = nodes.requests
    _, needs = nodes.path_lens_and_needs(first_positions, rows_before, block_size)
    if needs.sum() <= num_scratch:
        return list(trees)
    worth = np.concatenate([tree.path_probabilities() for tree in trees if tree is not None])
    sums = np.concatenate([[0.0], np.cumsum(worth)])
    densities = (sums[nodes.ends] - sums[nodes.starts]) / needs
    # A run is worth no more than the runs of its tree before it, so that the sorted order keeps theirs.
    firsts = np.flatnonzero(np.diff(of, prepend=-1))
    for begin, end in zip(firsts, np.append(firsts[1:], len(of)), strict=True):
        np.minimum.accumulate(densities[begin:end], out=densities[begin:end])
    order = np.argsort(-densities, kind="stable")
    kept = np.zeros(len(of), dtype=np.bool_)
    kept[order[np.cumsum(needs[order]) <= num_scratch]] = True
    dropped = np.flatnonzero(~kept)
    owners, first_dropped = np.unique(of[dropped], return_index=True)
    fitted = list(trees)
    for request, run in zip(owners.tolist(), dropped[first_dropped].tolist(), strict=True):
        tree = fitted[request]
        assert tree is not None
        fitted[request] = tree.truncated(int(nodes.starts[run] - nodes.offsets[request]))
    return fitted


def draft_blocks(
    own: NDArray[np.int32],
    allocated: NDArray[np.int32],
    lengths: IntArray,
    block_size: int,
    scratch: Scratch,
) -> tuple[IntArray, IntArray]:
    """Blocks of the rows of a draft pass: a request's own, behind them scratch, and the spill where that is used up.

    Args:
        own: int32 [b, width], each request's own blocks.
        allocated: int32 [b], how many of them it has.
        lengths: int64 [b], positions that must have a block.

    Returns:
        int64 [b, needed width] block ids, and int64 [b], how many of them belong to nobody else: rows beyond those
        read what other requests wrote.
    """
    needed = -(-lengths // block_size)
    missing = (needed - allocated).clip(min=0)
    served = np.cumsum(missing) <= len(scratch.blocks)
    first = scratch.blocks.start + np.cumsum(missing) - missing
    columns = np.arange(int(needed.max()))
    blocks = np.zeros((len(own), len(columns)), dtype=np.int64)
    known = min(len(columns), own.shape[1])
    blocks[:, :known] = own[:, :known]
    behind = columns - allocated[:, None]
    new = np.where(served[:, None], first[:, None] + behind, scratch.spill)
    blocks = np.where(behind < 0, blocks, np.where(columns < needed[:, None], new, 0))
    return blocks, np.where(served, needed, np.minimum(allocated, needed)).astype(np.int64)
