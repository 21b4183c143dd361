# SPDX-License-Identifier: Apache-2.0
"""Trees in which each node that is expanded is conditioned on its own path: those of chained maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_hidden_transfer.checkpoint.maps import TransferMaps
from vllm_hidden_transfer.evaluation.drafts import WIDTH, JudgedAnswer, on_device
from vllm_hidden_transfer.evaluation.walks import Place
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import Prefixes
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.tree import ROOT, TokenTree

BEAM = 8
"""Nodes of a level that are expanded. Up to this budget nothing is lost by it: a tree of n nodes has its
inner nodes among the n most probable of their level."""
_PLACES_AT_ONCE = 16


Follow = Callable[[Tensor], Tensor]
"""From paths of tokens, int64 [b, g, j], the sampled token first, to the states [b, g, d] after the last norm
that the token after each path is drafted from."""


class PathDrafter(ABC):
    """Best-first trees, level by level, of a drafter that sees the path to each node.

    The `BEAM` most probable nodes of a level are expanded whatever the budget, and a budget keeps the
    most probable paths of all that was seen, so a root is drafted once for all budgets.
    """

    def __init__(
        self, head: Tensor, answers: Sequence[JudgedAnswer], temperatures: Sequence[float]
    ) -> None:
        self._head, self._answers = head, answers
        self._temperatures = list(temperatures)
        self._trees: dict[tuple[Place, int | None], TokenTree] = {}
        self.depths = len(self._temperatures)

    @abstractmethod
    def _follow(self, examples: list[Example], roots: Tensor) -> Follow:
        """How to draft on paths from roots, int64 [b], one of each example."""

    def trees(
        self, places: Sequence[Place], budget: int, branching: int | None = None
    ) -> list[TokenTree]:
        """One tree a place; see `Drafter`."""
        if budget > WIDTH:
            raise ValueError(
                f"trees drafted path by path are judged up to {WIDTH} nodes, not {budget}"
            )
        missing = [place for place in places if (place, branching) not in self._trees]
        for start in range(0, len(missing), _PLACES_AT_ONCE):
            chunk = missing[start : start + _PLACES_AT_ONCE]
            for place, tree in zip(chunk, self._expand(chunk, branching), strict=True):
                self._trees[place, branching] = tree
        # Nodes are stored most probable first, so a smaller budget is a prefix.
        return [self._trees[place, branching].truncated(budget) for place in places]

    @torch.no_grad()
    def _expand(self, places: Sequence[Place], branching: int | None) -> list[TokenTree]:
        """The most probable `WIDTH` paths of each place, most probable first."""
        answers = [self._answers[place.answer] for place in places]
        pairs = list(zip(answers, places, strict=True))
        roots = torch.tensor([answer.root(place.known) for answer, place in pairs])
        follow = self._follow([answer.example for answer in answers], roots)
        sampled = [answer.tokens[place.known - 1] for answer, place in pairs]
        # b places, r groups (one for each node that is expanded), the tokens on the path to it.
        paths = torch.tensor(sampled)[:, None, None]
        scores = torch.zeros(len(places), 1, dtype=torch.float64)
        origins = torch.full((len(places), 1), ROOT)
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        first = 0
        for temperature in self._temperatures:
            logits = (follow(paths) @ self._head.T).float()
            log_probs = (logits / temperature).log_softmax(-1).cpu().double()
            best, tokens = log_probs.topk(min(branching or WIDTH, log_probs.shape[-1]), dim=-1)
            level = (scores[:, :, None] + best).flatten(1)
            parents = origins[:, :, None].expand_as(best).flatten(1)
            seen.append((tokens.flatten(1), parents, level))
            beam = min(branching or BEAM, level.shape[1])
            scores, chosen = level.topk(beam, dim=1)
            origins = first + chosen
            first += level.shape[1]
            before = torch.take_along_dim(paths, (chosen // best.shape[2])[:, :, None], dim=1)
            token = tokens.flatten(1).gather(1, chosen)
            paths = torch.cat([before, token[:, :, None]], dim=2)
        tokens, parents, scores = (torch.cat(part, dim=1) for part in zip(*seen, strict=True))
        return [
            _most_probable(*(part.numpy() for part in row))
            for row in zip(tokens, parents, scores, strict=True)
        ]


class ChainedDrafter(PathDrafter):
    """Trees of chained maps."""

    def __init__(
        self,
        target: FrozenTarget,
        prefixes: Prefixes,
        maps: TransferMaps,
        answers: Sequence[JudgedAnswer],
        temperatures: Sequence[float],
    ) -> None:
        super().__init__(target.head_weight, answers, temperatures)
        self._target, self._prefixes, self._maps = target, prefixes, maps.to(target.device)

    def _follow(self, examples: list[Example], roots: Tensor) -> Follow:
        device = self._target.device
        states = [
            self._prefixes.read("hidden", example)[root]
            for example, root in zip(examples, roots, strict=True)
        ]
        hidden = torch.stack(states).to(device)
        shared = on_device(self._prefixes.prefixes(examples), device)

        def follow(paths: Tensor) -> Tensor:
            groups = paths.shape[1]
            pseudo = self._pseudo(hidden, paths)
            rows_of = roots[:, None].expand(-1, groups).to(device)
            return self._target.run_rows(pseudo, rows_of, shared)[:, :, -1]

        return follow

    def _pseudo(self, hidden: Tensor, paths: Tensor) -> Tensor:
        """Pseudo states [b, r, j, d] along paths of j tokens [b, r, j] from roots' states [b, d]."""
        batch, groups, length = paths.shape
        embedding = self._target.embed(paths).float().view(batch * groups, length, -1)
        states: Tensor = self._maps(hidden.repeat_interleave(groups, dim=0), embedding)
        return states.view(batch, groups, length, -1)


def _most_probable(tokens: np.ndarray, parents: np.ndarray, scores: np.ndarray) -> TokenTree:
    """The `WIDTH` best nodes, best first: a child is never better than its parent and stands behind it."""
    chosen = np.argsort(-scores, kind="stable")[:WIDTH]
    place = np.full(len(tokens) + 1, ROOT)
    place[chosen] = np.arange(len(chosen))
    # The root is looked up at index -1, which no node has.
    return TokenTree(tokens[chosen], place[parents[chosen]])
