# SPDX-License-Identifier: Apache-2.0
"""Acceptance length with its interval, and how much a text repeats itself. No vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap


@dataclass(frozen=True)
class Acceptance:
    """Acceptance length of some requests: output tokens after the first, per decode pass."""

    length: float
    low: float
    high: float
    """95% interval over requests (percentile bootstrap, 9,999 resamples, fixed seed)."""
    requests: int
    repeated: float
    """Share of 4-grams that the same answer already had: loops flatter every drafter."""

    def __str__(self) -> str:
        return f"{self.length:.2f} ({self.low:.2f} to {self.high:.2f})"


def acceptance(
    decoded: Sequence[int], passes: Sequence[int], answers: Sequence[Sequence[int]]
) -> Acceptance:
    """Summed over requests: longer answers weigh more.

    Args:
        decoded: output tokens after the first, of each request.
        passes: decode passes, of each request.
        answers: the output tokens, of each request.
    """
    tokens, steps = np.array(decoded, dtype=float), np.array(passes, dtype=float)

    def length(some_tokens: np.ndarray, some_steps: np.ndarray, axis: int = -1) -> np.ndarray:
        return some_tokens.sum(axis=axis) / some_steps.sum(axis=axis)

    interval = bootstrap(
        (tokens, steps),
        length,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Acceptance(
        length=float(length(tokens, steps)),
        low=float(interval.low),
        high=float(interval.high),
        requests=len(decoded),
        repeated=repeated_share(answers),
    )


def repeated_share(answers: Sequence[Sequence[int]], size: int = 4) -> float:
    """Share of n-grams, over all answers, that occurred earlier in the same answer."""
    repeated = total = 0
    for answer in answers:
        grams = [tuple(answer[start : start + size]) for start in range(len(answer) - size + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0
