# SPDX-License-Identifier: Apache-2.0
"""Draft what pays and nothing else: for whom a draft pass runs, and how many nodes are verified. numpy, no vLLM.

Over the requests of a step together, tokens per second are to be most. Without drafts a step of b requests gives b
tokens in T(b) seconds. With a draft pass for m of them and N nodes it gives b + E(N) tokens in T(b + N) + D(m), where
E(N) is the sum of the nodes' probabilities: for a deterministic tree each node is accepted with the probability of its
path. So

- before a pass, the m requests whose drafts were accepted best, and n nodes for each, are those of the largest
  (b + E(m n)) / (T(b + m n) + D(m)); if that is not above b / T(b), nothing is drafted and the step is a stock step;
- behind it, when D is spent, nodes of all trees are taken in order of probability while E(N) - rate * T(b + N) rises,
  where the rate is the one that the pass was run for.

Where drafts are looked up and no pass is needed, they are made at every step and only the second question is asked,
with the largest (b + E(N)) / T(b + N) of these very nodes for the rate; if that is not above b / T(b), none is taken.

T and D are learned from the passes (``costs``), T of steps with trees and of steps without apart, because those are
stock's. Probabilities are those of the drafts, times what was accepted over what they had promised lately, for the
request and, as far as it has not shown much itself, for all of them. No threshold on the load is set by hand; what is
set by hand is what has to be gained at least, and how much is spent on looking:

- a number of requests is not drafted for before it was seen without drafts ``SEEN_FIRST`` times, and is seen again
  without them once in ``LOOK_EVERY`` steps, because T(b) is what everything is compared with;
- what drafting loses is kept account of, whatever was predicted: it may owe ``FIRST_TRIES`` steps without drafts, and
  owes ``TRY_SHARE`` of the time less as time goes by. Where nothing seems to pay it is tried again if that is owed,
  and not oftener than once in ``LOOK_EVERY`` steps;
- the first pass is for one request, and a step has at most ``STEP_UP`` times the rows of one whose cost is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vllm_hidden_transfer.drafting.costs import PassCosts

SEEN_FIRST = 4
LOOK_EVERY = 32
TRY_SHARE = 0.005
FIRST_TRIES = 4.0
"""Steps without drafts whose time drafting may owe."""
STEP_UP = 4
HINT = 0.05
"""Weight of a step without trees in the costs of steps with trees."""
CLEARLY = 1.1
"""What is gained must be more than the model of costs is off by. Drafts also make a batch's requests end at different
times, which costs a little where no others take their places."""
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


@dataclass(frozen=True)
class Choice:
    """What is drafted before a step."""

    drafted: tuple[int, ...]
    """Places of the requests that a draft pass runs for; none where it does not pay."""
    rate: float
    """Tokens a second that this is expected to give; 0 where nobody knows."""


@dataclass
class Budget:
    """The policy of one engine.

    Args:
        max_nodes: of a tree.
        free: whether drafts are looked up, without a pass.
    """

    max_nodes: int
    free: bool = False
    plain: PassCosts = field(default_factory=PassCosts)
    """T of steps without trees, by requests."""
    steps: PassCosts = field(default_factory=PassCosts)
    """T of steps with trees, by rows; those without are a hint, where little else is known."""
    passes: PassCosts = field(default_factory=PassCosts)
    """D, by requests."""
    skipped_passes: int = 0
    cut_nodes: int = 0

    def __post_init__(self) -> None:
        self._of_all = Record()
        self._of_each: dict[str, Record] = {}
        self._profile: FloatArray | None = None
        self._runs_per_node = 0.5
        self._since_look = 0
        self._since_try = LOOK_EVERY
        self._owed = 0.0  # in steps without drafts
        self._pass_seconds = 0.0
        # Predictions leave out what disturbs a pass. What a tree took is disturbed, too, and not the tree's fault.
        self._disturbance = 1.0
        counts = np.unique(np.round(np.geomspace(1, self.max_nodes, 12)).astype(np.int64))
        self._counts: NDArray[np.int64] = counts

    # What happened.

    def observe_pass(self, requests: int, reads: int, seconds: float) -> None:
        """A draft pass for so many requests."""
        self.passes.observe(requests, reads, seconds)
        self._pass_seconds += seconds

    def observe_step(
        self,
        requests: int,
        reads: int,
        seconds: float,
        trees: Sequence[Verified] = (),
        more_reads: int = 0,
    ) -> None:
        """A step in which all requests were decoding.

        Args:
            requests: in it.
            reads: tokens of their contexts.
            seconds: how long it took.
            trees: those that it verified.
            more_reads: what attention read again of the contexts for the trees' sake.
        """
        self._learn_acceptance(trees)
        rows = requests + sum(len(tree.probabilities) for tree in trees)
        self.steps.observe(rows, reads + more_reads, seconds, 1.0 if rows > requests else HINT)
        if rows == requests:
            self.plain.observe(rows, reads, seconds)
        step = float(self.plain.predict(requests, reads)) or seconds
        if rows == requests:
            self._disturbance += 0.05 * (min(seconds / step, 2) - self._disturbance)
        step *= self._disturbance
        self._owed -= TRY_SHARE * seconds / step
        if self._pass_seconds:
            accepted = sum(tree.accepted for tree in trees)
            took = step  # where nothing was verified, only the drafts were in vain
            if rows > requests:
                took = min(seconds, 2 * float(self.steps.predict(rows, reads + more_reads)))
            took += min(self._pass_seconds, 2 * float(self.passes.predict(len(trees) or 1, reads)))
            self._owed += took / step - (requests + accepted) / requests
        self._owed = max(self._owed, -FIRST_TRIES)
        self._pass_seconds = 0.0

    def observe_mixed_step(self, trees: Sequence[Verified]) -> None:
        """A step with prompts in it, whose time says nothing of decoding."""
        self._learn_acceptance(trees)
        self._pass_seconds = 0.0

    def _learn_acceptance(self, trees: Sequence[Verified]) -> None:
        for record in (self._of_all, *self._of_each.values()):
            record.fade(FADING)
        for tree in trees:
            promised = float(tree.probabilities.sum())
            self._of_all.add(promised, tree.accepted, memory=0.98)
            self._of_each.setdefault(tree.request_id, Record()).add(promised, tree.accepted)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._of_each.pop(request_id, None)

    # What to do.

    def choose(self, request_ids: Sequence[str], lengths: NDArray[np.int64]) -> Choice:
        """For whom to run a draft pass.

        Args:
            request_ids: of the requests that want drafts.
            lengths: int64 [b], tokens of each so far.
        """
        requests = len(request_ids)
        nobody = Choice((), 0.0)
        if self.plain.seen(requests) < SEEN_FIRST:
            return nobody  # T(b) first
        if self.free:
            return self._choose_freely(requests)
        if self._profile is None:
            return Choice((0,), 0.0)
        kept = np.array([self._kept(request_id) for request_id in request_ids])
        order = np.argsort(-kept, kind="stable")
        sizes = np.unique(
            [*(size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size < requests), requests]
        )
        promised = np.cumsum(self._profile)[self._counts - 1]
        gained = np.cumsum(kept[order])[sizes - 1, None] * promised
        nodes = sizes[:, None] * self._counts
        reads = float(lengths.sum())
        more_reads = np.cumsum(lengths[order])[sizes - 1, None] * self._counts * self._runs_per_node
        seconds = self.steps.predict(requests + nodes, reads + more_reads)
        drafting = self.passes.predict(sizes, np.cumsum(lengths[order])[sizes - 1])[:, None]
        rates = (requests + gained) / (seconds + drafting)
        rates[requests + nodes > self._most_rows(requests)] = 0.0
        best, count = np.unravel_index(int(rates.argmax()), rates.shape)
        step = float(self.plain.predict(requests, reads))
        drafted = Choice(tuple(sorted(order[: sizes[best]].tolist())), float(rates[best, count]))
        given = requests + float(gained[best, count])
        loss = given / drafted.rate / step - given / requests
        pays = drafted.rate > CLEARLY * requests / step
        self._since_try += 1
        too_soon = not pays and self._since_try < LOOK_EVERY
        if too_soon or self._owed + (0.0 if pays else loss) > FIRST_TRIES:
            self.skipped_passes += 1
            return nobody
        self._since_try = 0
        return nobody if self._looks() else drafted

    def _choose_freely(self, requests: int) -> Choice:
        """For all of them, unless that was in vain for long."""
        if self._owed > FIRST_TRIES:
            self.skipped_passes += 1
            return Choice((), 0.0)
        return Choice(() if self._looks() else tuple(range(requests)), 0.0)

    def _looks(self) -> bool:
        """Whether it is time to see again what a step without drafts costs."""
        self._since_look = (self._since_look + 1) % LOOK_EVERY
        return self._since_look == 0

    def _most_rows(self, requests: int) -> int:
        """Rows that the next step may have at most."""
        return max(STEP_UP * self.steps.most_known(), requests + 1)

    def cut(
        self, choice: Choice, requests: int, reads: int, trees: Sequence[tuple[str, FloatArray]]
    ) -> list[NDArray[np.bool_]]:
        """Which nodes of each drafted tree to verify.

        Args:
            choice: what the trees were drafted for.
            requests: of the step to come.
            reads: tokens of context that it reads without drafts.
            trees: the request's id and float64 [n], the probabilities of its nodes, as drafted.

        Returns:
            bool [n] for each tree. A node is never taken without its parent, which is at least as probable.
        """
        for _, probabilities in trees:
            self._learn_profile(probabilities)
        if choice.rate == 0 and not self.free:
            return [np.ones(len(each), dtype=np.bool_) for _, each in trees]
        worth = [self._kept(request_id) * each for request_id, each in trees]
        every = np.sort(np.concatenate(worth))[::-1] if worth else np.zeros(0)
        nodes = np.arange(len(every) + 1)
        mean_length = reads / max(requests, 1)
        reads_of = reads + nodes * self._runs_per_node * mean_length
        seconds = self.steps.predict(requests + nodes, reads_of)
        given = requests + np.concatenate([np.zeros(1), np.cumsum(every)])
        if self.free:
            rates = given / seconds
            rates[requests + nodes > self._most_rows(requests)] = 0.0
            taken = int(rates.argmax())
            if rates[taken] <= CLEARLY * requests / float(self.plain.predict(requests, reads)):
                taken = 0
        else:
            taken = int((given - choice.rate * seconds).argmax())
        # Of equal nodes all or none, lest a child stay without its parent.
        least = every[taken - 1] if taken else np.inf
        found = [each >= least for each in worth]
        self.cut_nodes += sum(int((~each).sum()) for each in found)
        return found

    def observe_runs(self, nodes: int, runs: int) -> None:
        """How often attention read a context again for so many verified nodes."""
        if nodes:
            self._runs_per_node = 0.95 * self._runs_per_node + 0.05 * runs / nodes

    def _kept(self, request_id: str) -> float:
        of_all = self._of_all.kept(prior=1.0, weight=EVIDENCE)
        record = self._of_each.get(request_id)
        return of_all if record is None else record.kept(of_all, EVIDENCE)

    def _learn_profile(self, probabilities: FloatArray) -> None:
        """The probabilities of a tree's nodes, the best first, over the trees lately."""
        found = np.zeros(self.max_nodes)
        best = np.sort(probabilities)[::-1][: self.max_nodes]
        found[: len(best)] = best
        self._profile = found if self._profile is None else 0.95 * self._profile + 0.05 * found
