# SPDX-License-Identifier: Apache-2.0
"""How often what was proposed came true, counted while serving. numpy, no vLLM."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

PRIOR_WEIGHT = 8.0
"""Observations that the prior counts for: it is another target's, or another text's."""
REMEMBERED = 512.0
"""Observations of a cell that count at most; then old ones are halved, because texts change."""

FloatArray = NDArray[np.float64]


class Frequencies:
    """A probability for each cell of a table, from a prior and from what was observed.

    Args:
        prior: float64 of any shape, probabilities before anything was observed.
    """

    def __init__(self, prior: FloatArray) -> None:
        self._tried = np.full(prior.shape, PRIOR_WEIGHT)
        self._came = prior * PRIOR_WEIGHT
        self.values: FloatArray = prior.copy()
        """float64, the shape of the prior: the estimates."""

    def observe(self, cells: tuple[ArrayLike, ...], came: ArrayLike) -> None:
        """What became of some proposals.

        Args:
            cells: an index array of n for each dimension.
            came: bool [n], whether it came true.
        """
        shape, size = self._tried.shape, self._tried.size
        flat = np.ravel_multi_index(tuple(map(np.asarray, cells)), shape)
        self._tried += np.bincount(flat, minlength=size).reshape(shape)
        self._came += np.bincount(flat, np.asarray(came, np.float64), size).reshape(shape)
        full = self._tried > REMEMBERED
        if full.any():
            self._tried[full] /= 2
            self._came[full] /= 2
        self.values = self._came / self._tried
