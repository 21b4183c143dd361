# SPDX-License-Identifier: Apache-2.0
"""Path decomposition: every row must see the prefix and its ancestors in order, and nothing else."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_tree import trees
from vllm_hidden_transfer.tree import Scratch, TokenTree, fit_to_scratch, lay_out_paths


@dataclass(frozen=True)
class Pass:
    """Requests of one pass: trees, rows before the root's, tokens computed, nodes that were cut behind the tree's."""

    trees: list[TokenTree | None]
    extra: list[int]
    computed: list[int]
    cut: list[int]
    block: int


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    batch = draw(st.lists(st.none() | trees(max_nodes=12), min_size=1, max_size=4))
    return Pass(
        batch,
        extra=[draw(st.integers(0, 3)) for _ in batch],
        computed=[draw(st.integers(0, 13)) for _ in batch],
        cut=[0 if tree is None else draw(st.integers(0, 9)) for tree in batch],
        block=draw(st.sampled_from([2, 4, 8])),
    )


@given(passes())
def test_every_row_sees_prefix_and_ancestors(case: Pass) -> None:
    batch, extra, computed, block = case.trees, case.extra, case.computed, case.block
    nodes = [len(tree) if tree else 0 for tree in batch]
    sizes = [sum(each) for each in zip(extra, [1] * len(batch), nodes, case.cut, strict=True)]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    roots = starts[:-1] + extra
    width = max(-(-(done + size) // block) for done, size in zip(computed, sizes, strict=True))
    table = np.arange(1, 1 + len(batch) * width, dtype=np.int32).reshape(len(batch), width)
    scratch = Scratch(range(1 + table.size, 1 + table.size + 200), 1 + table.size + 200)
    layout = lay_out_paths(batch, roots, starts, np.array(computed), table, block, scratch)

    cells: dict[int, object] = {}
    for request, done in enumerate(computed):
        for position in range(done):
            slot = int(table[request, position // block]) * block + position % block
            cells[slot] = ("prefix", request, position)
    for source, target in zip(layout.copy_from.tolist(), layout.copy_to.tolist(), strict=True):
        for offset in range(block):
            cells[target * block + offset] = cells.get(source * block + offset)
    for row, slot in zip(layout.write_rows.tolist(), layout.write_slots.tolist(), strict=True):
        cells[slot] = ("row", row)

    seen = {}
    for sequence, length in enumerate(layout.seq_lens.tolist()):
        queries = range(int(layout.query_starts[sequence]), int(layout.query_starts[sequence + 1]))
        slots = [
            int(layout.block_table[sequence, position // block]) * block + position % block
            for position in range(length)
        ]
        for query in queries:
            visible = length - (queries[-1] - query)
            seen[query] = [cells[slot] for slot in slots[:visible]]
    assert sorted(seen) == list(range(int(starts[-1])))

    side_rows = []
    dead_slots = set(range(scratch.spill * block, (scratch.spill + 1) * block))
    for request, tree in enumerate(batch):
        prefix = [("prefix", request, position) for position in range(computed[request])]
        begin, root_row = int(starts[request]), int(roots[request])
        for row in range(begin, root_row + 1):
            assert seen[row] == prefix + [("row", other) for other in range(begin, row + 1)]
        for node in range(nodes[request]):
            assert tree is not None
            rows = [*range(begin, root_row + 1), *(root_row + 1 + tree.path(node)).tolist()]
            assert seen[root_row + 1 + node] == prefix + [("row", row) for row in rows]
            if tree.path(node).tolist() != list(range(node + 1)):
                side_rows.append(root_row + 1 + node)
        dead = range(root_row + 1 + nodes[request], int(starts[request + 1]))
        written = {
            slot
            for row, slot in zip(layout.write_rows, layout.write_slots, strict=True)
            if row in dead
        }
        assert written <= dead_slots
    assert layout.side_rows.tolist() == side_rows


def test_a_chain_needs_no_scratch() -> None:
    table = np.array([[5, 6, 7]], dtype=np.int32)
    layout = lay_out_paths(
        [TokenTree.chain([1, 2, 3])],
        np.array([0]),
        np.array([0, 4]),
        np.array([6]),
        table,
        4,
        Scratch(range(0), 0),
    )
    assert layout.query_starts.tolist() == [0, 4]
    assert layout.seq_lens.tolist() == [10]
    assert not len(layout.copy_from)


def test_too_little_scratch_is_refused() -> None:
    tree = TokenTree(np.array([1, 2]), np.array([-1, -1]))
    table = np.array([[5, 6]], dtype=np.int32)
    with pytest.raises(ValueError, match="scratch"):
        lay_out_paths(
            [tree],
            np.array([0]),
            np.array([0, 3]),
            np.array([3]),
            table,
            4,
            Scratch(range(9, 10), 10),
        )


@given(st.lists(st.none() | trees(max_nodes=12), min_size=1, max_size=4), st.data())
def test_fitted_trees_fit(batch: list[TokenTree | None], data: st.DataObject) -> None:
    """And whatever subset of them is asked, one pass has room for it."""
    block, num_scratch = 4, data.draw(st.integers(0, 40))
    firsts = np.array([data.draw(st.integers(0, 9)) for _ in batch])
    before = np.array([data.draw(st.integers(1, 5)) for _ in batch])
    fitted = fit_to_scratch(batch, firsts, before, block, num_scratch)
    for tree, cut in zip(batch, fitted, strict=True):
        assert (tree is None) == (cut is None)
        if tree is not None and cut is not None:
            assert cut.tokens.tolist() == tree.tokens[: len(cut)].tolist()
            assert cut.depths.tolist() == tree.depths[: len(cut)].tolist()
    nodes = [len(tree) if tree else 0 for tree in batch]
    starts = np.concatenate([[0], np.cumsum(before + nodes)])
    table = np.arange(1, 1 + len(batch) * 8, dtype=np.int32).reshape(len(batch), 8)
    scratch = Scratch(range(1 + table.size, 1 + table.size + num_scratch), 0)
    roots = starts[:-1] + before - 1
    lay_out_paths(fitted, roots, starts, firsts, table, block, scratch)  # would raise


def fan(*probabilities: float) -> TokenTree:
    """Children of the root: one run each."""
    count = len(probabilities)
    return TokenTree(np.arange(count), np.full(count, -1), np.log(probabilities))


def test_trees_that_fit_are_left_alone() -> None:
    batch = [TokenTree(np.array([1, 2, 3]), np.array([-1, -1, -1]))] * 2
    ones = np.array([1, 1])
    assert fit_to_scratch(batch, np.array([5, 6]), ones, 4, 4) == batch


def test_scratch_goes_where_it_is_worth_most() -> None:
    sure, vague = fan(0.4, 0.3, 0.2), fan(0.15, 0.1, 0.05)
    fitted = fit_to_scratch([vague, sure], np.array([4, 4]), np.array([1, 1]), 4, 2)
    assert [len(tree) for tree in fitted if tree] == [1, 3]
    fitted = fit_to_scratch([vague, sure], np.array([4, 4]), np.array([1, 1]), 4, 3)
    assert [len(tree) for tree in fitted if tree] == [2, 3]
