# SPDX-License-Identifier: Apache-2.0
"""What a pass costs, learned from the passes themselves. numpy, no vLLM.

The time of a pass is modelled as f(rows) + c * reads, where f is linear between powers of two and ``reads`` are the
tokens of context that its attention reads. It is the least-squares fit to the latest passes of each size, with a small
weight on every change of slope: where nothing was measured the nearest slope goes on, and where only one size was
measured there is none. Whatever disturbs a pass makes it slower, so one that took twice the quicker ones of its size
says nothing, nor one of many that took clearly longer than the fit has it, and one or two of a size alone say little.
What was measured long ago is forgotten: the load has changed.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

KNOTS: NDArray[np.float64] = np.exp2(np.arange(13, dtype=np.float64))
"""Rows between which a pass's time is linear: 1, 2, 4, ... 4096."""
KEPT = 24
"""Passes of each size that count: older ones were another load's."""
FRESH = 1000
"""Passes of all sizes after which one is forgotten."""
REFIT = 8
"""Passes between two fits, once as many of a size are known."""
TRUST = (0.001, 0.02)
"""Weight of the only pass of a size, and of the only two, beside 1 for one of three or more."""
STIFFNESS = 0.02
"""Weight on a change of slope, beside 1 for a measured pass, both relative to its time."""
FLATNESS = 1e-4
"""Weight on slopes themselves, which decides only where nothing else does."""
CLEARLY_LONGER = 1.2
READING = 0.01
"""Weight on the price of reading, which short contexts do not show."""

FloatArray = NDArray[np.float64]


def size_of(rows: int) -> int:
    """Which of the knots a pass counts for: the nearest below."""
    return min(max(int(rows), 1).bit_length() - 1, len(KNOTS) - 1)


class _Pass(NamedTuple):
    number: int
    rows: float
    reads: float
    seconds: float
    weight: float


class PassCosts:
    """Seconds of one kind of pass."""

    def __init__(self) -> None:
        self._passes: list[deque[_Pass]] = [deque(maxlen=KEPT) for _ in KNOTS]
        self._hints: list[deque[_Pass]] = [deque(maxlen=KEPT) for _ in KNOTS]
        """Passes of another kind, which are many and must not push the others out."""
        self._count = 0
        self._fit: tuple[FloatArray, float] | None = None

    def observe(self, rows: int, reads: int, seconds: float, weight: float = 1.0) -> None:
        """A pass that was measured.

        Args:
            rows: of all requests together.
            reads: tokens of context that its attention read, each as often as it was read.
            seconds: how long it took.
            weight: of this pass beside others; below 1 it is one of another kind, which is only a hint.
        """
        self._count += 1
        passes = (self._hints if weight < 1 else self._passes)[size_of(rows)]
        passes.append(_Pass(self._count, float(rows), float(reads), seconds, weight))
        if len(passes) < REFIT or self._count % REFIT == 0:
            self._fit = None

    def seen(self, rows: int) -> int:
        """How many passes of about this size count, at most ``KEPT``."""
        return len(self._passes[size_of(rows)])

    def most_known(self) -> int:
        """The most rows of which at least as many passes as make one trusted were measured; 0 if there are none."""
        known = [passes for passes in self._all() if len(passes) > len(TRUST)]
        return int(max((one.rows for passes in known for one in passes), default=0))

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return any(self._all())

    def _all(self) -> list[deque[_Pass]]:
        return [*self._passes, *self._hints]

    def predict(self, rows: ArrayLike, reads: ArrayLike) -> FloatArray:
        """Seconds of passes; 0 where nothing was measured. More rows never cost less."""
        if not self.known:
            return np.zeros(np.broadcast(rows, reads).shape)
        if self._fit is None:
            self._fit = self._fitted()
        times, each_read = self._fit
        found: FloatArray = np.interp(
            np.asarray(rows, dtype=np.float64), KNOTS, times
        ) + each_read * np.asarray(reads)
        return found

    def _fitted(self) -> tuple[FloatArray, float]:
        """Seconds at the knots, and of one token read."""
        passes = np.array(self._undisturbed())
        times, each_read = _fit_to(passes)
        rows, reads, seconds, *_, many = passes.T
        longer = seconds > CLEARLY_LONGER * (np.interp(rows, KNOTS, times) + each_read * reads)
        return _fit_to(passes[~longer | (many == 0)])

    def _undisturbed(self) -> list[tuple[float, float, float, float, bool]]:
        """Rows, reads, seconds and trust of the passes that count, and whether there are many of their size."""
        found = []
        for passes in self._all():
            while passes and passes[0].number <= self._count - FRESH:
                passes.popleft()
        for passes in filter(None, self._all()):
            limit = 2 * float(np.quantile([one.seconds for one in passes], 0.25))
            trust = (0.0, *TRUST, 1.0)[min(len(passes), 3)]
            found += [
                (one.rows, one.reads, one.seconds, trust * one.weight, len(passes) >= REFIT)
                for one in passes
                if one.seconds <= limit
            ]
        return found


def _fit_to(passes: FloatArray) -> tuple[FloatArray, float]:
    """Seconds at the knots, and of one token read; of passes [n, (rows, reads, seconds, trust, ...)]."""
    rows, reads, seconds, trust, *_ = passes.T
    # Relative errors: a long pass may be as far off as a short one, in parts of itself.
    unit = float(np.median(seconds))
    reads_unit = max(float(reads.max()), 1.0)
    weights = trust**0.5 * unit / seconds
    measured = np.column_stack([_hats(rows), reads / reads_unit]) * weights[:, None]
    normal = measured.T @ measured + _PRIOR
    right = measured.T @ (weights * seconds / unit)
    solution = np.linalg.solve(normal, right) * unit
    if solution[-1] < 0 or (np.diff(solution[:-1]) < 0).any():
        # More rows seemed to cost less: what they cost was taken for the price of reading.
        solution[:-1] = np.linalg.solve(normal[:-1, :-1], right[:-1]) * unit
        solution[-1] = 0.0
    return np.maximum.accumulate(solution[:-1]), float(solution[-1]) / reads_unit


def _hats(rows: FloatArray) -> FloatArray:
    """[n, knots]: the shares of each knot in a value between two of them."""
    rows = rows.clip(KNOTS[0], KNOTS[-1])
    left = np.minimum(np.searchsorted(KNOTS, rows, side="right") - 1, len(KNOTS) - 2)
    share = (rows - KNOTS[left]) / (KNOTS[left + 1] - KNOTS[left])
    found, each = np.zeros((len(rows), len(KNOTS))), np.arange(len(rows))
    found[each, left], found[each, left + 1] = 1 - share, share
    return found


def _prior() -> FloatArray:
    """What is believed before anything is measured, as a part of the normal equations of knots and reads."""
    slopes = np.diff(np.eye(len(KNOTS)), axis=0) / np.diff(KNOTS)[:, None]
    bends, flat = np.diff(slopes, axis=0) * KNOTS[1:-1, None], slopes * KNOTS[:-1, None]
    found = np.zeros((len(KNOTS) + 1, len(KNOTS) + 1))
    found[:-1, :-1] = STIFFNESS * bends.T @ bends + FLATNESS * flat.T @ flat
    found[-1, -1] = READING
    return found


_PRIOR = _prior()
