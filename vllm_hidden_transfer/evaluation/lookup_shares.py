# SPDX-License-Identifier: Apache-2.0
"""How far prompt lookup is to be trusted beside some maps: fitted on recorded answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_hidden_transfer.drafting.lookup import DEEPEST_COPY, LONGEST_MATCH, look_up
from vllm_hidden_transfer.evaluation.drafts import FloatArray, JudgedAnswer
from vllm_hidden_transfer.evaluation.walks import Place
from vllm_hidden_transfer.tree import NO_TOKEN, Candidates

ROUNDS = 60
PSEUDO_SEEN = 8
"""Cells with few observations lean on their depth as a whole, which counts for so many."""


class Seen(NamedTuple):
    """One token of an answer that followed a copy so far."""

    match: int
    """1 to ``LONGEST_MATCH``."""
    depth: int
    """0 to ``DEEPEST_COPY`` - 1."""
    by_maps: float
    """Its probability under the maps; 0 where it was no candidate, and below their last depth."""
    copied: bool
    """Whether the copy has it too."""


def seen(answer: JudgedAnswer, places: Sequence[Place], candidates: Candidates) -> Iterator[Seen]:
    """What one answer shows at some of its places.

    Args:
        answer: the judged answer.
        places: where its decode passes may start.
        candidates: what the maps say there.
    """
    text = np.array(answer.example.tokens[: answer.first + len(answer.tokens)])
    starts = np.array([answer.first + place.known for place in places])
    copies = look_up([text[:start] for start in starts])
    by_maps = _by_maps(text, starts, candidates)
    for row, start in enumerate(starts):
        match = int(copies.matches[row])
        for depth, (token, copy) in enumerate(zip(text[start:], copies.tokens[row], strict=False)):
            if not match or copy == NO_TOKEN:
                break
            yield Seen(match, depth, float(by_maps[row, depth]), bool(token == copy))
            if token != copy:
                break


def _by_maps(
    text: NDArray[np.int64], starts: NDArray[np.int64], candidates: Candidates
) -> FloatArray:
    """[places, DEEPEST_COPY]: the probability of what came at each depth, after what came before it."""
    found = np.zeros((len(starts), DEEPEST_COPY))
    for depth in range(candidates.tokens.shape[1]):
        places = (starts + depth).clip(max=len(text) - 1)
        before, came = (torch.from_numpy(text[at]) for at in (places - 1, places))
        scores = candidates.after(depth, before[:, None])[:, 0]
        hit = candidates.tokens[:, depth] == came[:, None]
        found[:, depth] = torch.where(hit, scores.double().exp(), 0.0).sum(-1).numpy()
    return found


def fit_shares(observed: Sequence[Seen]) -> FloatArray:
    """The shares [LONGEST_MATCH, DEEPEST_COPY] under which what came is most probable, by EM for each cell."""
    cells = np.array([(one.match - 1) * DEEPEST_COPY + one.depth for one in observed])
    by_maps = np.array([one.by_maps for one in observed])
    copied = np.array([float(one.copied) for one in observed])
    size = LONGEST_MATCH * DEEPEST_COPY
    count = np.bincount(cells, minlength=size).reshape(LONGEST_MATCH, DEEPEST_COPY)
    shares = np.full(size, 0.5)
    for _ in range(ROUNDS):
        share = shares[cells]
        both = share * copied + (1 - share) * by_maps
        blame = np.divide(share * copied, both, out=np.zeros_like(both), where=both > 0)
        sums = np.bincount(cells, blame, minlength=size).reshape(count.shape)
        whole = (sums.sum(0) + 0.5) / (count.sum(0) + 1)
        shares = ((sums + PSEUDO_SEEN * whole) / (count + PSEUDO_SEEN)).ravel()
    return shares.reshape(count.shape)
