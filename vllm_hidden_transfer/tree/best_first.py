# SPDX-License-Identifier: Apache-2.0
"""Best-first trees on the host, for drafts that are looked up and not computed.

Where a node's children are two or three table rows, a heap takes the n most probable paths one by one in less time than
``build.most_probable`` needs for its tensors. The tree is the same: see there why it is the best of n nodes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from itertools import count
from typing import TypeVar

import numpy as np

from vllm_hidden_transfer.tree.token_tree import ROOT, TokenTree

State = TypeVar("State")


def best_first(
    root: State,
    children: Callable[[State], Iterable[tuple[int, float, State]]],
    budget: int,
    least: float = 0.0,
) -> TokenTree:
    """The ``budget`` most probable paths, best first.

    Args:
        root: whatever ``children`` needs to know of a node.
        children: token, probability after the node, and state of each child; tokens are distinct.
        budget: nodes at most.
        least: paths that are not more probable than this are left out.

    Returns:
        The tree with its log-probabilities. Of equally probable paths the one that was met first comes first.
    """
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    met = count()
    heap: list[tuple[float, int, int, int, State]] = []

    def open_node(node: int, state: State, probability: float) -> None:
        for token, share, child in children(state):
            path = probability * share
            if path > least:
                heapq.heappush(heap, (-path, next(met), node, token, child))

    open_node(ROOT, root, 1.0)
    while heap and len(tokens) < budget:
        negative, _, parent, token, state = heapq.heappop(heap)
        node = len(tokens)
        tokens.append(token)
        parents.append(parent)
        scores.append(math.log(-negative))
        if node + 1 < budget:
            open_node(node, state, -negative)
    return TokenTree(
        np.array(tokens, dtype=np.int64), np.array(parents, dtype=np.int64), np.array(scores)
    )


def in_runs(tree: TokenTree) -> TokenTree:
    """The same tree in path-major order: what ``build.path_major`` does, for one tree on the host.

    Args:
        tree: best first, so that the first child of a node is its most probable one.
    """
    parents = tree.parents.tolist()
    heads: list[int] = []
    continued = set()
    for node, parent in enumerate(parents):
        follows = parent != ROOT and parent not in continued
        continued.add(parent)
        heads.append(heads[parent] if follows else node)
    order = np.argsort(heads, kind="stable")
    places = np.empty(len(order) + 1, dtype=np.int64)
    places[order] = np.arange(len(order))
    places[-1] = ROOT  # where the root's own index leads
    scores = tree.log_probabilities
    return TokenTree.trusted(
        tree.tokens[order],
        places[tree.parents[order]],
        tree.depths[order],
        None if scores is None else scores[order],
    )
