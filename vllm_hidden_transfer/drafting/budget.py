# SPDX-License-Identifier: Apache-2.0
"""Draft what pays and nothing else: for whom a draft pass runs, and how many nodes are verified. numpy, no vLLM.

Over the requests of a step together, tokens per second are to be most. Without drafts a step of b requests gives b
tokens in T(b) seconds. With N nodes it gives b + E(N) tokens in T(b + N), where E(N) is the sum of the nodes'
probabilities: for a deterministic tree each node is accepted with the probability of its path. A draft pass for m of
the requests takes D(m) more. Drafts that are looked up in the text cost next to nothing and are there at every step. So

- of the looked-up nodes of all trees those are taken, in order of probability, that make (b + E(N)) / T(b + N) most; if
  that is not above b / T(b), none is;
- before a pass, the m requests whose drafts were accepted best, and n nodes for each, are those of the largest
  (b + E(m n)) / (T(b + m n) + D(m)); if that is not above what the looked-up nodes give, there is no pass, and where
  those give nothing either, the step is a stock step;
- behind it, when D is spent, nodes of all trees are taken in order of probability while E(N) - rate * T(b + N) rises,
  where the rate is the one that the pass was run for.

T and D are learned from the passes (``costs``), T of steps with trees and of steps without apart, because those are
stock's. Probabilities are those of the drafts, times what was accepted over what they had promised lately, for the
request and, as far as it has not shown much itself, for all of them (``ledger``). No threshold on the load is set by
hand; what is set by hand is what has to be gained at least, and how much is spent on looking:

- a number of requests is not drafted for before it was seen without drafts ``SEEN_FIRST`` times, and is seen again
  without them once in ``LOOK_EVERY`` steps, because T(b) is what everything is compared with;
- what each way of drafting loses at a load is kept account of, whatever was predicted: it may owe ``FIRST_TRIES`` steps
  without drafts, and owes ``TRY_SHARE`` of the time less as time goes by. Where a pass does not pay clearly it is tried
  within that once in ``LOOK_EVERY`` steps, or in ``LOOK_SOON`` where it seems to pay a little and owes nothing;
- the first passes are for one request, ``FIRST_PASSES`` of them behind one that warms up, whatever they cost;
- a step has at most ``STEP_UP`` times the rows of one whose cost is known, or ``WIDE_STEP_UP`` times where that one has
  more than ``WIDE``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_hidden_transfer.drafting.costs import PassCosts
from vllm_hidden_transfer.drafting.ledger import FloatArray, Ledger, Verified

SEEN_FIRST = 4
FIRST_PASSES = 3
"""Draft passes that are run whatever they cost: what one or two took may have been somebody else's work."""
LOOK_EVERY, LOOK_SOON = 32, 8
TRY_SHARE = 0.005
FIRST_TRIES = 4.0
"""Steps without drafts whose time a way of drafting may owe."""
STEP_UP, WIDE_STEP_UP = 4, 2
WIDE = 16
"""Rows from which on a step into the unknown is the smaller one: it is a longer one."""
HINT = 0.05
"""Weight of a step without trees in the costs of steps with trees."""
CLEARLY = 1.1
"""What is gained must be more than the model of costs is off by. Drafts also make a batch's requests end at different
times, which costs a little where no others take their places."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Choice:
    """What is drafted before a step."""

    drafted: tuple[int, ...] = ()
    """Places of the requests that a draft pass runs for; none where it does not pay."""
    rate: float = 0.0
    """Tokens a second that this is expected to give; 0 where nobody knows."""
    given: float = 0.0
    """Tokens that the step is expected to give."""
    looked_up: tuple[Mask, ...] = ()
    """The nodes to verify of each looked-up tree, where there is no pass and these pay."""


NOTHING = Choice()


class Budget:
    """The policy of one engine.

    Args:
        max_nodes: of a tree.
        passes: whether there are draft passes; without, drafts are looked up only.
    """

    def __init__(self, max_nodes: int, *, passes: bool = True) -> None:
        self.max_nodes = max_nodes
        self.passes = passes
        self.plain = PassCosts()
        """T of steps without trees, by requests."""
        self.steps = PassCosts()
        """T of steps with trees, by rows; those without are a hint, where little else is known."""
        self.maps = Ledger()
        """Of draft passes; its costs are D."""
        self.text = Ledger()
        """Of looked-up drafts."""
        self.skipped_passes = 0
        self.cut_nodes = 0
        self._profile: FloatArray | None = None
        self._runs_per_node = 0.5
        self._since_look = 0
        self._since_try = LOOK_EVERY
        # Predictions leave out what disturbs a pass. What a tree took is disturbed, too, and not the tree's fault.
        self._disturbance = 1.0
        counts = np.unique(np.round(np.geomspace(1, self.max_nodes, 12)).astype(np.int64))
        self._counts: NDArray[np.int64] = counts

    # What happened.

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
        losses = {ledger: ledger.taken_spending() / step for ledger in (self.maps, self.text)}
        if rows > requests:
            took = min(seconds, 2 * float(self.steps.predict(rows, reads + more_reads)))
            accepted = sum(tree.accepted for tree in trees)
            charged = self.text if all(tree.looked_up for tree in trees) else self.maps
            losses[charged] += took / step - (requests + accepted) / requests
        for ledger, loss in losses.items():
            ledger.charge(requests, loss - TRY_SHARE * seconds / step, -FIRST_TRIES)

    def observe_mixed_step(self, trees: Sequence[Verified]) -> None:
        """A step with prompts in it, whose time says nothing of decoding."""
        self._learn_acceptance(trees)
        for ledger in (self.maps, self.text):
            ledger.taken_spending()

    def observe_runs(self, nodes: int, runs: int) -> None:
        """How often attention read a context again for so many verified nodes."""
        if nodes:
            self._runs_per_node = 0.95 * self._runs_per_node + 0.05 * runs / nodes

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self.maps.forget(request_id)
        self.text.forget(request_id)

    def _learn_acceptance(self, trees: Sequence[Verified]) -> None:
        self.maps.learn([tree for tree in trees if not tree.looked_up])
        self.text.learn([tree for tree in trees if tree.looked_up])

    # What to do.

    def looks_up(self, requests: int) -> bool:
        """Whether looked-up drafts are wanted for so many: not where they were in vain for long."""
        return self.text.owed(requests) <= FIRST_TRIES

    def least_worth(self, request_ids: Sequence[str], reads: float) -> float:
        """The probability from which on a looked-up node may pay for these requests, as it was drafted.

        So many nodes pay only if on the average they are worth the tokens of the time that their rows take. Where rows
        become dearer, as they do on most machines, no node pays that is worth less than the cheapest of these averages.
        """
        requests = len(request_ids)
        without = float(self.plain.predict(requests, reads))
        if without == 0:
            return 0.0
        nodes = np.unique(np.concatenate([self._counts, requests * self._counts]))
        more = self._seconds(requests, nodes, reads) - without
        kept = max(self.text.kept(request_id) for request_id in request_ids)
        return max(float((more / nodes).min()) * requests / without / max(kept, 1e-6), 0.0)

    def choose(
        self,
        request_ids: Sequence[str],
        lengths: NDArray[np.int64],
        looked_up: Sequence[FloatArray] = (),
    ) -> Choice:
        """What to draft.

        Args:
            request_ids: of the b requests that want drafts.
            lengths: int64 [b], tokens of each so far.
            looked_up: float64 [n] for each request, the probabilities of the nodes that were looked up for it.
        """
        requests, reads = len(request_ids), float(lengths.sum())
        if self.plain.seen(requests) < SEEN_FIRST:
            return NOTHING  # T(b) first
        if self.passes and (self._profile is None or self.maps.times < FIRST_PASSES):
            return Choice((0,))
        chosen = found = self._of_text(request_ids, reads, looked_up)
        if self.passes:
            drafted = self._of_maps(request_ids, lengths)
            chosen = drafted if self._passes_now(requests, reads, drafted, found) else found
        if chosen.drafted or chosen.looked_up:
            self._since_look = (self._since_look + 1) % LOOK_EVERY
            if self._since_look == 0:
                return NOTHING
        return chosen

    def cut(
        self, choice: Choice, requests: int, reads: int, trees: Sequence[tuple[str, FloatArray]]
    ) -> list[Mask]:
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
        if choice.rate == 0:
            return [np.ones(len(each), dtype=np.bool_) for _, each in trees]
        worth = [self.maps.kept(request_id) * each for request_id, each in trees]
        given, seconds = self._by_nodes(worth, requests, reads)
        most = max(self._most_rows(requests) - requests, 0) + 1
        taken = int((given - choice.rate * seconds)[:most].argmax())
        return self._taken(worth, taken)

    def _of_text(
        self, request_ids: Sequence[str], reads: float, trees: Sequence[FloatArray]
    ) -> Choice:
        """What looked-up nodes give; with the rate of a step without any where they do not pay."""
        requests = len(request_ids)
        without = requests / float(self.plain.predict(requests, reads))
        if not any(len(each) for each in trees):
            return Choice(rate=without)
        worth = [self.text.kept(name) * each for name, each in zip(request_ids, trees, strict=True)]
        given, seconds = self._by_nodes(worth, requests, reads)
        rates = given / seconds
        rates[requests + np.arange(len(rates)) > self._most_rows(requests)] = 0.0
        taken = int(rates.argmax())
        if taken == 0 or rates[taken] <= CLEARLY * without:
            return Choice(rate=without)
        return Choice(rate=float(rates[taken]), looked_up=tuple(self._taken(worth, taken)))

    def _of_maps(self, request_ids: Sequence[str], lengths: NDArray[np.int64]) -> Choice:
        """The draft pass that gives most."""
        assert self._profile is not None
        requests, reads = len(request_ids), float(lengths.sum())
        kept = np.array([self.maps.kept(request_id) for request_id in request_ids])
        order = np.argsort(-kept, kind="stable")
        sizes = np.unique(
            [*(size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size < requests), requests]
        )
        promised = np.cumsum(self._profile)[self._counts - 1]
        gained = np.cumsum(kept[order])[sizes - 1, None] * promised
        nodes = sizes[:, None] * self._counts
        read_by_pass = np.cumsum(lengths[order])[sizes - 1]
        more_reads = read_by_pass[:, None] * self._counts * self._runs_per_node
        seconds = self.steps.predict(requests + nodes, reads + more_reads)
        drafting = self.maps.costs.predict(sizes, read_by_pass)[:, None]
        rates = (requests + gained) / (seconds + drafting)
        rates[requests + nodes > self._most_rows(requests)] = 0.0
        best, count = np.unravel_index(int(rates.argmax()), rates.shape)
        return Choice(
            drafted=tuple(sorted(order[: sizes[best]].tolist())),
            rate=float(rates[best, count]),
            given=requests + float(gained[best, count]),
        )

    def _passes_now(self, requests: int, reads: float, drafted: Choice, found: Choice) -> bool:
        """Whether a pass is run rather than the step that there is without one: it pays, or may be tried."""
        pays = drafted.rate > CLEARLY * found.rate
        step = float(self.plain.predict(requests, reads))
        loss = drafted.given * (1 / drafted.rate - 1 / found.rate) / step
        owed = self.maps.owed(requests)
        self._since_try += 1
        wait = LOOK_SOON if loss < 0 and owed < 0 else LOOK_EVERY
        too_soon = not pays and self._since_try < wait
        if too_soon or owed + (0.0 if pays else loss) > FIRST_TRIES:
            self.skipped_passes += 1
            return False
        self._since_try = 0
        return True

    def _by_nodes(
        self, worth: Sequence[FloatArray], requests: int, reads: float
    ) -> tuple[FloatArray, FloatArray]:
        """The tokens and the seconds of a step with 0 to n of all nodes, the best first."""
        every = np.sort(np.concatenate(worth))[::-1] if worth else np.zeros(0)
        seconds = self._seconds(requests, np.arange(len(every) + 1), reads)
        return requests + np.concatenate([np.zeros(1), np.cumsum(every)]), seconds

    def _seconds(self, requests: int, nodes: NDArray[np.int64], reads: float) -> FloatArray:
        """What a step takes with so many nodes to verify."""
        reads_of = reads + nodes * self._runs_per_node * reads / max(requests, 1)
        return self.steps.predict(requests + nodes, reads_of)

    def _taken(self, worth: Sequence[FloatArray], taken: int) -> list[Mask]:
        """Which nodes of each tree are among so many best. Of equal ones those that stand first are taken, because a
        parent stands before its children."""
        found = np.zeros(sum(map(len, worth)), dtype=np.bool_)
        found[np.argsort(-np.concatenate(worth), kind="stable")[:taken]] = True
        self.cut_nodes += int((~found).sum())
        return np.split(found, np.cumsum([len(each) for each in worth])[:-1])

    def _most_rows(self, requests: int) -> int:
        """Rows that the next step may have at most."""
        known = self.steps.most_known()
        return max((STEP_UP if known <= WIDE else WIDE_STEP_UP) * known, requests + 1)

    def _learn_profile(self, probabilities: FloatArray) -> None:
        """The probabilities of a drafted tree's nodes, the best first, over the trees lately."""
        found = np.zeros(self.max_nodes)
        best = np.sort(probabilities)[::-1][: self.max_nodes]
        found[: len(best)] = best
        self._profile = found if self._profile is None else 0.95 * self._profile + 0.05 * found
