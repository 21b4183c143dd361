# SPDX-License-Identifier: Apache-2.0
"""Path decomposition: every row must see the prefix and its ancestors in order, and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_tree import trees
from vllm_hidden_transfer.tree import TokenTree, fit_to_scratch, lay_out_paths


@st.composite
def passes(draw: st.DrawFn) -> tuple[list[TokenTree | None], list[int], list[int], int]:
    batch = draw(st.lists(st.none() | trees(max_nodes=12), min_size=1, max_size=4))
    extra = [draw(st.integers(0, 3)) for _ in batch]
    computed = [draw(st.integers(0, 13)) for _ in batch]
    return batch, extra, computed, draw(st.sampled_from([2, 4, 8]))


@given(passes())
def test_every_row_sees_prefix_and_ancestors(
    case: tuple[list[TokenTree | None], list[int], list[int], int],
) -> None:
    batch, extra, computed, block = case
    sizes = [more + 1 + (len(tree) if tree else 0) for tree, more in zip(batch, extra, strict=True)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    width = max(-(-(done + size) // block) for done, size in zip(computed, sizes, strict=True))
    table = np.arange(1, 1 + len(batch) * width, dtype=np.int32).reshape(len(batch), width)
    scratch = range(1 + table.size, 1 + table.size + 200)
    layout = lay_out_paths(batch, starts, np.array(computed), table, block, scratch)

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
    assert layout.write_rows[layout.first_write].tolist() == list(range(int(starts[-1])))

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

    for request, tree in enumerate(batch):
        prefix = [("prefix", request, position) for position in range(computed[request])]
        begin, end = int(starts[request]), int(starts[request + 1])
        root_row = end - 1 - (len(tree) if tree else 0)
        for row in range(begin, root_row + 1):
            assert seen[row] == prefix + [("row", other) for other in range(begin, row + 1)]
        for node in range(len(tree) if tree else 0):
            assert tree is not None
            rows = [*range(begin, root_row + 1), *(root_row + 1 + tree.path(node)).tolist()]
            assert seen[root_row + 1 + node] == prefix + [("row", row) for row in rows]


def test_a_chain_needs_no_scratch() -> None:
    table = np.array([[5, 6, 7]], dtype=np.int32)
    layout = lay_out_paths(
        [TokenTree.chain([1, 2, 3])], np.array([0, 4]), np.array([6]), table, 4, range(0)
    )
    assert layout.query_starts.tolist() == [0, 4]
    assert layout.seq_lens.tolist() == [10]
    assert not len(layout.copy_from)


def test_too_little_scratch_is_refused() -> None:
    tree = TokenTree(np.array([1, 2]), np.array([-1, -1]))
    table = np.array([[5, 6]], dtype=np.int32)
    with pytest.raises(ValueError, match="scratch"):
        lay_out_paths([tree], np.array([0, 3]), np.array([3]), table, 4, range(9, 10))


@given(st.lists(trees(max_nodes=12), min_size=1, max_size=4), st.integers(0, 40), st.data())
def test_fitted_trees_fit(batch: list[TokenTree], num_scratch: int, data: st.DataObject) -> None:
    """Whatever subset of the fitted trees is scheduled, one pass has room for it."""
    block = 4
    firsts = [data.draw(st.integers(0, 9)) for _ in batch]
    fitted = fit_to_scratch(batch, firsts, block, num_scratch)
    for tree, cut in zip(batch, fitted, strict=True):
        assert cut.tokens.tolist() == tree.tokens[: len(cut)].tolist()
    starts = np.concatenate([[0], np.cumsum([len(tree) + 1 for tree in fitted])])
    table = np.arange(1, 1 + len(batch) * 8, dtype=np.int32).reshape(len(batch), 8)
    scratch = range(1 + table.size, 1 + table.size + num_scratch)
    lay_out_paths(fitted, starts, np.array(firsts), table, block, scratch)  # would raise


def test_trees_that_fit_are_left_alone() -> None:
    batch = [TokenTree(np.array([1, 2, 3]), np.array([-1, -1, -1]))] * 2
    assert fit_to_scratch(batch, [5, 6], 4, 4) == batch
    assert [len(tree) for tree in fit_to_scratch(batch, [5, 6], 4, 3)] == [2, 2]
