# SPDX-License-Identifier: Apache-2.0
"""Build trees: the n most probable paths of per-depth draft distributions.

For a deterministic tree the expected number of accepted tokens is the sum of the target's path probabilities over
the nodes, so under the draft distribution the best tree of n nodes is the n most probable paths (the best-first tree
of DDTree, https://github.com/liranringel/ddtree, and of EAGLE-2, arXiv 2406.16858, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_hidden_transfer.tree.candidates import Candidates, CopiedPaths, GivenCandidates
from vllm_hidden_transfer.tree.tensors import TreeTensors
from vllm_hidden_transfer.tree.token_tree import ROOT, TokenTree


def most_probable(
    candidates: Candidates, budget: int, copied: CopiedPaths | None = None
) -> TreeTensors:
    """The ``budget`` most probable paths of every request, best first. Nothing waits for the device.

    Args:
        candidates: of b requests. Those that are -inf or NaN never live.
        budget: nodes of each tree, dead ones included.
        copied: paths to mix in, which may be longer than there are candidates.

    Returns:
        The trees. Of equally probable paths any may be taken, but never a child without its parent.
    """
    tokens = candidates.tokens
    num_requests, num_depths, _ = tokens.shape
    beam = _Beam.roots(tokens)
    levels: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    first = 0
    for depth in range(max(num_depths, 0 if copied is None else copied.tokens.shape[1])):
        if depth < num_depths:
            names = tokens[:, depth]
            scores = beam.scores[:, :, None] + candidates.after(depth, beam.tokens)
        else:
            names = tokens.new_empty(num_requests, 0)
            scores = beam.scores.new_empty(*beam.scores.shape, 0)
        if copied is not None and depth < copied.tokens.shape[1]:
            names, scores = _with_copied(names, scores, beam, copied, depth)
        # A node of the best tree is among the ``budget`` best of its own depth, so a beam loses nothing.
        width = names.shape[1]
        flat = scores.flatten(1)
        flat.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        keep = min(budget, flat.shape[1])
        kept, best = flat.topk(keep, dim=1)
        above = best // width
        chosen = names.gather(1, best % width)
        levels.append((chosen, beam.nodes.gather(1, above), kept))
        nodes = torch.arange(first, first + keep, device=tokens.device).expand(num_requests, keep)
        copies = beam.copies
        if copied is not None and depth < copied.tokens.shape[1]:
            copies = beam.copies.gather(1, above) & (chosen == copied.tokens[:, depth, None])
        beam = _Beam(chosen, kept, nodes, copies)
        first += keep
    all_tokens, all_parents, all_scores = (
        torch.cat(part, dim=1) for part in zip(*levels, strict=True)
    )
    return _take(all_tokens, all_parents, all_scores, budget)


@dataclass(frozen=True)
class _Beam:
    """The nodes of one depth whose children are tried, all [b, m]."""

    tokens: torch.Tensor
    scores: torch.Tensor
    """Log-probabilities of their paths."""
    nodes: torch.Tensor
    """Their places among all that were tried, ``ROOT`` for the root."""
    copies: torch.Tensor
    """Whether the path to a node is the copied one so far."""

    @classmethod
    def roots(cls, like: torch.Tensor) -> _Beam:
        """The roots of b requests, on the device of their candidates [b, depths, width]."""
        tokens = like.new_zeros(len(like), 1)
        return cls(
            tokens, tokens.double(), torch.full_like(tokens, ROOT), torch.ones_like(tokens).bool()
        )


def _with_copied(
    names: torch.Tensor, scores: torch.Tensor, beam: _Beam, copied: CopiedPaths, depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix the copied path's next token in, as one more column that lives where it is no candidate already.

    Args:
        names: int64 [b, width].
        scores: float64 [b, m, width], of the paths of the beam with each of these behind it.
    """
    token, share = copied.tokens[:, depth, None], copied.shares[:, depth, None]
    mixed = torch.where(beam.copies[:, :, None], scores + (-share).log1p()[:, :, None], scores)
    followed = (beam.scores + share.log()).masked_fill(~beam.copies, -torch.inf)
    same = names == token
    both = torch.logaddexp(mixed, followed[:, :, None])
    alone = followed.masked_fill(same.any(1, keepdim=True), -torch.inf)
    mixed = torch.cat([torch.where(same[:, None], both, mixed), alone[:, :, None]], dim=2)
    return torch.cat([names, token], dim=1), mixed


def _take(
    tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor, budget: int
) -> TreeTensors:
    """The best nodes in the order of their scores, which no parent follows its child in: the sort is stable, and
    shallower nodes come first in what is sorted."""
    ordered, places = scores.sort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(places)
    rank.scatter_(1, places, torch.arange(places.shape[1], device=places.device).expand_as(places))
    new_parents = torch.where(parents == ROOT, ROOT, rank.gather(1, parents.clamp(min=0)))
    found = min(budget, places.shape[1])
    missing = (0, budget - found)
    pad = torch.nn.functional.pad
    chosen_scores = pad(ordered[:, :found], missing, value=-torch.inf)
    alive = chosen_scores.isfinite()
    chosen_tokens = pad(tokens.gather(1, places[:, :found]), missing)
    chosen_parents = pad(new_parents.gather(1, places[:, :found]), missing)
    before = torch.arange(budget, device=tokens.device) - 1
    return TreeTensors(
        torch.where(alive, chosen_tokens, 0),
        torch.where(alive, chosen_parents, before),
        alive,
        chosen_scores,
    )


def path_major(trees: TreeTensors) -> TreeTensors:
    """The same trees with every run as long as can be: a path's rows stay together. Nothing waits for the device.

    A node's first child in the given order continues its run. The most probable path so comes first: its rows need no
    copy of the cache. The other runs follow in the order of their first node, so that a tree which is cut from its
    end loses its least probable runs.

    Args:
        trees: best first, as ``most_probable`` gives them; dead nodes last.
    """
    parents, alive, size = trees.parents, trees.alive, trees.parents.shape[1]
    nodes = torch.arange(size, device=parents.device)
    older_sibling = (parents[:, :, None] == parents[:, None, :]) & (nodes < nodes[:, None])
    continues = alive & (parents != ROOT) & ~older_sibling.any(-1)
    heads = torch.where(continues, parents, nodes)
    for _ in range((size - 1).bit_length()):  # each look-up doubles the steps towards the head
        heads = heads.gather(1, heads)
    key = torch.where(alive, heads * size + nodes, size * size + nodes)
    order = key.argsort(dim=1)
    place = torch.empty_like(order)
    place.scatter_(1, order, nodes.expand_as(order))
    moved = torch.where(parents == ROOT, ROOT, place.gather(1, parents.clamp(min=0)))
    new_alive = alive.gather(1, order)
    return TreeTensors(
        trees.tokens.gather(1, order),
        torch.where(new_alive, moved.gather(1, order), nodes - 1),
        new_alive,
        None if trees.log_probabilities is None else trees.log_probabilities.gather(1, order),
    )


def most_probable_paths(
    tokens: NDArray[np.int64], log_probabilities: NDArray[np.float64], budget: int
) -> list[TokenTree]:
    """``most_probable`` in path-major order, as trees on the host with at most ``budget`` nodes."""
    given = GivenCandidates(torch.tensor(tokens), torch.tensor(log_probabilities))
    return path_major(most_probable(given, budget)).on_host()


def limit_runs(tree: TokenTree, max_runs: int) -> TokenTree:
    """The tree with its first ``max_runs`` runs only (at least the first).

    Later runs hang off earlier rows, never the other way, so what is left is a tree.
    """
    starts: Sequence[int] = tree.run_starts.tolist()
    if len(starts) <= max(max_runs, 1):
        return tree
    return tree.truncated(starts[max(max_runs, 1)] - 1)
