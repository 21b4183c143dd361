# SPDX-License-Identifier: Apache-2.0
"""Token Recycling: the target's last best guesses after each token, kept for the next time that token stands somewhere.

A verification pass computes a whole distribution at every row and uses one token of it; the next ones are likely to
follow the same token elsewhere (arXiv 2408.08696, section 3). One table for all requests, of fixed size. How far a
guess is trusted goes by the probability that it had then, and by how often guesses of such a probability were the
target's best when the token came again. No vLLM.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_hidden_transfer.drafting.frequencies import Frequencies
from vllm_hidden_transfer.tree import NO_TOKEN

WIDTH = 8
"""Successors that are kept of each token."""

_EDGES = np.array((0.97, 0.9, 0.75, 0.5, 0.3, 0.15, 0.06))
"""Guesses are binned by probability: above the first, between the first two, and so on, and below the last."""
_FROM_TEXT = len(_EDGES) + 1
"""The bin of what followed a token in a prompt and was no guess of the target's."""
_PRIOR = np.array((0.75, 0.55, 0.45, 0.35, 0.2, 0.12, 0.06, 0.02, 0.2))


_CHUNK = 64

MOST_ROWS = 16
"""Rows of a step whose guesses are looked for at most: that costs 50 microseconds each, batches have many, and the
table learns from every step."""


def best_guesses(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens of some rows, likeliest first.

    Args:
        logits: [n, vocabulary].

    Returns:
        int64 and float32 [n, WIDTH]: tokens, and their probabilities among these few. The sum over the whole vocabulary
        would cost as much again, and how far a probability is trusted is learned anyway.
    """
    size = logits.shape[1]
    if size % _CHUNK or size < WIDTH * _CHUNK:
        best, tokens = logits.topk(WIDTH)
        return tokens, best.float().softmax(-1)
    # The best stand in the chunks with the best maxima, and a maximum costs a fraction of a sort.
    chunks = logits.unflatten(1, (-1, _CHUNK))
    places = chunks.amax(-1).topk(WIDTH).indices
    found = chunks.gather(1, places[:, :, None].expand(-1, -1, _CHUNK)).flatten(1)
    best, inside = found.topk(WIDTH)
    tokens = places.gather(1, inside // _CHUNK) * _CHUNK + inside % _CHUNK
    return tokens, best.float().softmax(-1)


class Successors:
    """Each token's likeliest successors.

    Args:
        vocabulary: number of token ids; the table takes 40 bytes for each.
    """

    def __init__(self, vocabulary: int) -> None:
        self._tokens = np.full((vocabulary, WIDTH), NO_TOKEN, dtype=np.int32)
        self._bins = np.full((vocabulary, WIDTH), _FROM_TEXT, dtype=np.int8)
        self._trust = Frequencies(_PRIOR)

    def learn(
        self,
        tokens: NDArray[np.integer],
        successors: NDArray[np.integer],
        probabilities: NDArray[np.floating],
    ) -> None:
        """What the target holds likely after some tokens, in texts that need not be related.

        Args:
            tokens: [n]; of equal ones the last counts.
            successors: [n, WIDTH], the likeliest first.
            probabilities: [n, WIDTH]; a row with a NaN is not learned, and nothing of probability 0.
        """
        usable = np.isfinite(probabilities).all(1) & (tokens >= 0) & (tokens < len(self._tokens))
        tokens, successors = tokens[usable], successors[usable]
        probabilities = probabilities[usable]
        before = self._tokens[tokens]
        known = before != NO_TOKEN
        came = before == successors[:, :1]
        self._trust.observe((self._bins[tokens][known],), came[known])
        self._tokens[tokens] = np.where(probabilities > 0, successors, NO_TOKEN)
        # Probabilities fall along the edges, so that a larger one is found further left.
        self._bins[tokens] = np.searchsorted(-_EDGES, -probabilities)

    def warm(self, text: NDArray[np.integer]) -> None:
        """Give the tokens of a prompt that nothing is known of what followed them there."""
        if not len(text):
            return
        tokens, following = text[:-1], text[1:]
        unknown = self._tokens[tokens, 0] == NO_TOKEN
        self._tokens[tokens[unknown], 0] = following[unknown]

    def after(self, token: int) -> list[tuple[int, float]]:
        """The successors of a token, each with its probability; together they have at most 1."""
        row = self._tokens[token]
        known = row != NO_TOKEN
        found = row[known].tolist()
        trust = self._trust.values[self._bins[token][known]]
        total = float(trust.sum())
        if total > 1:
            trust = trust / total
        return list(zip(found, trust.tolist(), strict=True))
