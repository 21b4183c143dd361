# SPDX-License-Identifier: Apache-2.0
"""What one way of drafting promised, gave and cost. numpy, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_hidden_transfer.drafting.costs import KNOTS, PassCosts, size_of

MEMORY = 0.9
"""Of promises and of what was kept of them, from one verified tree to the next."""
FADING = 0.99
"""The same from one step to the next, so that what once failed is tried again."""
EVIDENCE = 4.0
"""Promised tokens from which on a request's own record counts more than that of all."""

FloatArray = NDArray[np.float64]


@dataclass
class Record:
    """Tokens that drafts promised, and those of them that were accepted."""

    promised: float = 0.0
    accepted: float = 0.0

    def add(self, promised: float, accepted: float, memory: float = MEMORY) -> None:
        self.fade(memory)
        self.promised += promised
        self.accepted += accepted

    def fade(self, memory: float) -> None:
        self.promised *= memory
        self.accepted *= memory

    def kept(self, prior: float, weight: float) -> float:
        """The part of a promise that is kept, with ``weight`` tokens promised at ``prior`` besides."""
        return (self.accepted + weight * prior) / (self.promised + weight)


@dataclass(frozen=True)
class Verified:
    """One request in a verification step."""

    request_id: str
    probabilities: FloatArray
    """float64 [n]: of the nodes that were verified, as drafted."""
    accepted: int
    looked_up: bool = False
    """Whether its tree came without a draft pass."""


class Ledger:
    """One way of drafting: its records, its costs and what it owes."""

    def __init__(self) -> None:
        self.costs = PassCosts()
        """Of making drafts, by requests."""
        self.times = 0
        """How often drafts were made, the first time left out."""
        self._cold = True
        self._owed = np.zeros(len(KNOTS))
        self._spent = 0.0
        self._of_all = Record()
        self._of_each: dict[str, Record] = {}

    def spend(self, requests: int, reads: int, seconds: float) -> None:
        """Drafts were made for so many requests. The first time of an engine is its warm-up and says nothing of others:
        it may take ten times as long."""
        if self._cold:
            self._cold = False
            return
        self.times += 1
        self.costs.observe(requests, reads, seconds)
        self._spent += min(seconds, 2 * float(self.costs.predict(requests, reads)))

    def taken_spending(self) -> float:
        """Seconds that drafts took since this was asked last; clear outliers are cut down."""
        spent, self._spent = self._spent, 0.0
        return spent

    def owed(self, requests: int) -> float:
        """What drafting lost at about so many requests, in steps without drafts: another load's loss says nothing."""
        return float(self._owed[size_of(requests)])

    def charge(self, requests: int, steps: float, least: float) -> None:
        """Add to what is owed, which stays above ``least``: old gains do not pay for new losses."""
        size = size_of(requests)
        self._owed[size] = max(self._owed[size] + steps, least)

    def learn(self, trees: Sequence[Verified]) -> None:
        """What became of the trees of a step, of all those that were drafted this way."""
        for record in (self._of_all, *self._of_each.values()):
            record.fade(FADING)
        for tree in trees:
            promised = float(tree.probabilities.sum())
            self._of_all.add(promised, tree.accepted, memory=0.98)
            self._of_each.setdefault(tree.request_id, Record()).add(promised, tree.accepted)

    def kept(self, request_id: str) -> float:
        """The part of a promise to a request that is likely to be kept."""
        of_all = self._of_all.kept(prior=1.0, weight=EVIDENCE)
        record = self._of_each.get(request_id)
        return of_all if record is None else record.kept(of_all, EVIDENCE)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._of_each.pop(request_id, None)
