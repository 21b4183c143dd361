# SPDX-License-Identifier: Apache-2.0
"""The token tree of one request: draft tokens with their parents, in topological order.

The root is the last sampled token. It is not a node, but it is row 0 of the verification pass, so node ``i`` is
row ``i + 1``. Nothing here knows vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

ROOT = -1


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Draft tokens of one request, every parent before its children.

    Args:
        tokens: int64 [n], the draft token of each node.
        parents: int64 [n], the index of each node's parent, ``ROOT`` (-1) for a child of the root.
        log_probabilities: float64 [n], of each node's path from the root under the drafts; None where nobody knows.

    Raises:
        ValueError: when the two differ in length or a parent does not precede its child.
    """

    tokens: IntArray
    parents: IntArray
    log_probabilities: FloatArray | None = None
    depths: IntArray = field(init=False)

    def __post_init__(self) -> None:
        tokens = np.asarray(self.tokens, dtype=np.int64)
        parents = np.asarray(self.parents, dtype=np.int64)
        if tokens.ndim != 1 or tokens.shape != parents.shape:
            raise ValueError(
                f"a token tree needs as many parents as tokens in one dimension, not "
                f"{parents.shape} and {tokens.shape}"
            )
        if len(parents) and (
            parents.min() < ROOT or bool((parents >= np.arange(len(parents))).any())
        ):
            raise ValueError("a token tree is topological: each parent must precede its child")
        depths = np.ones(len(tokens), dtype=np.int64)
        for node, parent in enumerate(parents.tolist()):
            if parent != ROOT:
                depths[node] = depths[parent] + 1
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "parents", parents)
        object.__setattr__(self, "depths", depths)

    @classmethod
    def trusted(
        cls,
        tokens: IntArray,
        parents: IntArray,
        depths: IntArray,
        log_probabilities: FloatArray | None = None,
    ) -> TokenTree:
        """A tree from arrays that are known to be one, without a look at them: for code that runs in every step."""
        tree = object.__new__(cls)
        tree.__dict__.update(
            tokens=tokens, parents=parents, depths=depths, log_probabilities=log_probabilities
        )
        return tree

    @classmethod
    def chain(cls, tokens: ArrayLike) -> TokenTree:
        """A tree with one path: each node is the child of the one before it."""
        array = np.asarray(tokens, dtype=np.int64)
        return cls(array, np.arange(len(array)) - 1)

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> TokenTree:
        """The prefix tree of token paths from the root, in the order given; shared prefixes are merged."""
        tokens: list[int] = []
        parents: list[int] = []
        known: dict[tuple[int, int], int] = {}
        for path in paths:
            node = ROOT
            for token in path:
                if (node, token) not in known:
                    known[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = known[node, token]
        return cls(np.array(tokens, dtype=np.int64), np.array(parents, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.tokens)

    def truncated(self, num_nodes: int) -> TokenTree:
        """The first ``num_nodes`` nodes. A prefix of a topological order is a tree again."""
        if num_nodes >= len(self):
            return self
        scores = self.log_probabilities
        return TokenTree.trusted(
            self.tokens[:num_nodes],
            self.parents[:num_nodes],
            self.depths[:num_nodes],
            None if scores is None else scores[:num_nodes],
        )

    def kept(self, nodes: NDArray[np.bool_]) -> TokenTree:
        """Some of the nodes, bool [n], each with its parent, in the order that they have."""
        if nodes.all():
            return self
        places = np.concatenate([[ROOT], np.cumsum(nodes) - 1])
        scores = self.log_probabilities
        return TokenTree.trusted(
            self.tokens[nodes],
            places[self.parents[nodes] + 1],
            self.depths[nodes],
            None if scores is None else scores[nodes],
        )

    def path_probabilities(self) -> FloatArray:
        """float64 [n]: of each node's path; where nobody knows, each child counts half of its parent."""
        scores = self.log_probabilities
        halves = np.log(0.5) * self.depths
        return np.exp(halves if scores is None else scores).astype(np.float64, copy=False)

    @cached_property
    def max_depth(self) -> int:
        """Depth of the deepest node; 0 for an empty tree."""
        return int(self.depths.max()) if len(self) else 0

    @cached_property
    def run_starts(self) -> IntArray:
        """int64 [r]: the rows (root included, so row 0 first) at which a new run begins.

        A run is a maximal stretch of consecutive rows of which each is the child of the row before it, so a run is
        the tail of one root-to-node path. Attention sees a run as one request (path decomposition).
        """
        breaks = np.flatnonzero(self.parents + 1 != np.arange(len(self))) + 1
        return np.concatenate([np.zeros(1, dtype=np.int64), breaks])

    @property
    def is_chain(self) -> bool:
        """Whether the rows form a single path in order, as stock speculation has it."""
        return len(self.run_starts) == 1

    def path(self, node: int) -> IntArray:
        """int64 [depth]: the nodes from the root's child down to ``node``; empty for the root."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = int(self.parents[node])
        return np.array(nodes[::-1], dtype=np.int64)

    def paths(self) -> list[IntArray]:
        """Every root-to-leaf path as node indices, in the order of the leaves."""
        inner = set(self.parents.tolist())
        return [self.path(node) for node in range(len(self)) if node not in inner]

    def positions(self, root_position: int) -> IntArray:
        """int64 [n + 1]: the position of the root's row and of every node's row."""
        return root_position + np.concatenate([np.zeros(1, dtype=np.int64), self.depths])

    def mask(self) -> NDArray[np.bool_]:
        """bool [n + 1, n + 1]: whether row i may attend to row j (itself, its ancestors, the root)."""
        mask = np.eye(len(self) + 1, dtype=np.bool_)
        for node, parent in enumerate(self.parents.tolist()):
            mask[node + 1] |= mask[parent + 1]
        return mask

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        edges = zip(self.parents.tolist(), self.tokens.tolist(), strict=True)
        children: dict[tuple[int, int], int] = {}
        for node, edge in enumerate(edges):
            children.setdefault(edge, node)
        return children

    def child(self, node: int, token: int) -> int | None:
        """The child of ``node`` that carries ``token`` (the first of equal siblings), or None."""
        return self._children.get((node, token))
