# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: what followed the last tokens where they stood before, in the prompt or in the answer so far.

Saxena's prompt lookup (https://github.com/apoorvumang/prompt-lookup-decoding) proposes such a copy alone; here it is a
path that is mixed into the tree of the maps (``tree.CopiedPaths``). How far it is trusted hangs on how many tokens
matched and on how deep it is, because a copy that was right so far is likely to go on. numpy, no vLLM, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_hidden_transfer.tree import NO_TOKEN, CopiedPaths

LONGEST_MATCH = 4
"""Tokens that are compared at most: a longer match was not trusted more."""
DEEPEST_COPY = 8
SHARES: NDArray[np.float64] = np.array(
    (
        (0.00, 0.25, 0.42, 0.59, 0.76, 0.78, 0.77, 0.85),
        (0.01, 0.29, 0.53, 0.64, 0.75, 0.80, 0.80, 0.84),
        (0.02, 0.39, 0.59, 0.69, 0.83, 0.85, 0.85, 0.88),
        (0.09, 0.63, 0.79, 0.85, 0.91, 0.92, 0.92, 0.93),
    )
)
"""[LONGEST_MATCH, DEEPEST_COPY], by length of the match and depth: the share of a copy beside the demo's maps, fitted
(``benchmarks/lookup_shares.py``) to the demo target's own answers to 240 training prompts. See ``tree.CopiedPaths``."""


@dataclass(frozen=True)
class Copies:
    """The copies that a batch of contexts proposes."""

    tokens: NDArray[np.int64]
    """[b, DEEPEST_COPY]: what would follow; ``NO_TOKEN`` where nothing was found."""
    matches: NDArray[np.int64]
    """[b]: how many last tokens stood before it there, 0 where nothing was found."""


def look_up(contexts: Sequence[NDArray[np.integer]]) -> Copies:
    """The newest of the longest matches of each context.

    Args:
        contexts: each request's tokens so far, the one just sampled included.
    """
    tokens = np.full((len(contexts), DEEPEST_COPY), NO_TOKEN, dtype=np.int64)
    matches = np.zeros(len(contexts), dtype=np.int64)
    for row, context in enumerate(contexts):
        end, matches[row] = _newest_match(context)
        if matches[row]:
            # A copy that reaches the end goes on with itself, as text in a loop does.
            tokens[row] = np.resize(context[end : end + DEEPEST_COPY], DEEPEST_COPY)
    return Copies(tokens, matches)


def _newest_match(context: NDArray[np.integer]) -> tuple[int, int]:
    """Where the newest of the longest matches ends, and how long it is; the context's end and 0 where there is none."""
    ends = np.flatnonzero(context[:-1] == context[-1])
    found, length = ends[-1:], 1
    while len(ends) and length < LONGEST_MATCH:
        ends = ends[ends >= length]
        ends = ends[context[ends - length] == context[-1 - length]]
        if len(ends):
            found, length = ends[-1:], length + 1
    return (int(found[0]) + 1, length) if len(found) else (len(context), 0)


def mixed_in(copies: Copies, shares: NDArray[np.float64]) -> CopiedPaths | None:
    """Copies with the trust that they get, None where no request has one: that tree is built in half the time.

    Args:
        copies: of b requests.
        shares: float64 [LONGEST_MATCH, DEEPEST_COPY]: by length of the match and depth (see ``CopiedPaths``).
    """
    if not copies.matches.any():
        return None
    trust = np.concatenate([np.zeros((1, shares.shape[1])), shares])[copies.matches]
    trust = np.where(copies.tokens == NO_TOKEN, 0.0, trust)
    return CopiedPaths(torch.from_numpy(copies.tokens), torch.from_numpy(trust))
