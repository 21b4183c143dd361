# SPDX-License-Identifier: Apache-2.0
"""Are draft probabilities what they claim? Temperatures that make them so, and how far off they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_hidden_transfer.evaluation.drafts import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    Drafts,
)
from vllm_hidden_transfer.evaluation.study_result import CalibrationBin

FloatArray = NDArray[np.float64]

CANDIDATES = 10
"""The most probable tokens of a row that its calibration is judged on; smaller trees hold no others."""
BINS = 10


def fit_temperatures(drafts: Sequence[Drafts]) -> list[float]:
    """The softmax temperature of each depth with the least negative log-likelihood of what came.

    A depth that no answer reaches keeps 1.0.
    """
    from scipy.optimize import minimize_scalar

    fitted = []
    for depth in range(drafts[0].tokens.shape[1]):
        if not any(np.isfinite(item.came_logits[:, depth]).any() for item in drafts):
            fitted.append(1.0)
            continue
        # In the inverse temperature the loss is convex: one minimum.
        found = minimize_scalar(
            lambda inverse, depth=depth: _loss(drafts, depth, 1 / inverse),
            bounds=(1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE),
            method="bounded",
            options={"xatol": 1e-4},
        )
        fitted.append(round(1 / float(found.x), 4))
    return fitted


def negative_log_likelihood(drafts: Sequence[Drafts], temperatures: Sequence[float]) -> list[float]:
    """Mean of -log p(the token that came), in nats, at each depth; 0 where no answer reaches it."""
    return [_loss(drafts, depth, value) for depth, value in enumerate(temperatures)]


def _loss(drafts: Sequence[Drafts], depth: int, temperature: float) -> float:
    losses = np.concatenate(
        [
            item.log_totals(depth, temperature) - item.came_logits[:, depth] / temperature
            for item in drafts
        ]
    )
    inside = np.isfinite(losses)
    return float(losses[inside].mean()) if inside.any() else 0.0


def reliability(
    drafts: Sequence[Drafts], temperatures: Sequence[float]
) -> list[list[CalibrationBin]]:
    """Of each depth: its candidates in bins of equal width of the probability that they claim."""
    claimed = np.concatenate(
        [np.exp(item.log_probabilities(temperatures)[:, :, :CANDIDATES]) for item in drafts]
    )
    ranks = np.concatenate([item.ranks for item in drafts])
    right = ranks[:, :, None] == np.arange(claimed.shape[-1])
    return [
        bin_probabilities(claimed[rows, depth].ravel(), right[rows, depth].ravel())
        for depth, rows in enumerate((ranks >= 0).T)
    ]


def bin_probabilities(claimed: FloatArray, right: NDArray[np.bool_]) -> list[CalibrationBin]:
    """`BINS` bins of equal width from 0 to 1; 1 belongs to the last."""
    numbers = np.minimum((claimed * BINS).astype(int), BINS - 1)
    counts = np.bincount(numbers, minlength=BINS)
    expected = np.bincount(numbers, weights=claimed, minlength=BINS)
    found = np.bincount(numbers, weights=right, minlength=BINS)
    return [
        CalibrationBin(
            nodes=int(count),
            claimed=round(float(claim / max(count, 1)), 5),
            right=round(float(hit / max(count, 1)), 5),
        )
        for count, claim, hit in zip(counts, expected, found, strict=True)
    ]


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Expected calibration error: |claimed - right|, averaged over the nodes of all bins."""
    nodes = sum(item.nodes for item in bins)
    return sum(item.nodes * abs(item.claimed - item.right) for item in bins) / max(nodes, 1)
