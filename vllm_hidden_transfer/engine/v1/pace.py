# SPDX-License-Identifier: Apache-2.0
"""The budget (``drafting.budget``) on the V1 runner's steps: what it is told of them, and what it decides.

A step is timed from the end of the one before, scheduling included, until its tokens are known, and drafts from then
until their trees are there. Steps with a prompt in them are not told: what they cost says nothing of decoding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from vllm.logger import init_logger

from vllm_hidden_transfer.drafting.budget import Budget, Choice
from vllm_hidden_transfer.drafting.ledger import Verified
from vllm_hidden_transfer.drafting.source import DraftBatch, DraftSource
from vllm_hidden_transfer.engine.announce import DOES_NOT_PAY
from vllm_hidden_transfer.engine.v1.step import Step
from vllm_hidden_transfer.tree import TokenTree

logger = init_logger("vllm.hidden_transfer")

_NO_TREE = TokenTree.chain([])
LEARN_EVERY = 4
"""Steps without trees of which the text's sources see one: all of them would cost more than a percent of the time."""


class Pace:
    """One engine's budget.

    Args:
        max_nodes: of a tree.
        passes: whether drafts may come from a pass through the target.
    """

    def __init__(self, max_nodes: int, *, passes: bool = True) -> None:
        self.budget = Budget(max_nodes, passes=passes)
        self._ended = 0.0
        self._plain_steps = 0
        self._learned = 0.0
        """Seconds that the text's sources took in this step to see what the target computed."""
        self._looked_up: set[str] = set()
        """Requests whose latest tree was looked up."""

    def observe(self, step: Step, request_ids: Sequence[str]) -> None:
        """A step has its tokens; its requests stand in the order of the batch."""
        if not step.trees:
            return
        walk, trees = step.walk, []
        more_reads = runs = nodes = 0
        lengths = (step.root_positions + 1).tolist()
        for request, (tree, length) in enumerate(zip(step.trees, lengths, strict=True)):
            if tree is None or walk is None:
                continue
            node, name = walk.nodes[request], request_ids[request]
            accepted = 0 if node < 0 else int(tree.depths[node])
            probabilities = tree.path_probabilities()
            trees.append(Verified(name, probabilities, accepted, name in self._looked_up))
            more_reads += length * (len(tree.run_starts) - 1)
            runs += len(tree.run_starts) - 1
            nodes += len(tree)
        self.budget.observe_runs(nodes, runs)
        if not step.decoding:
            self.budget.observe_mixed_step(trees)
            return
        seconds = time.perf_counter() - step.started
        between = step.started - self._ended
        if between < seconds:  # longer, and nobody had asked for anything
            seconds += between
        self.budget.observe_step(len(lengths), sum(lengths), seconds, trees, more_reads)

    @contextmanager
    def learning(self, step: Step) -> Iterator[bool]:
        """Whether the text's sources are to see what the target computed in a step, whose cost is theirs."""
        started = time.perf_counter()
        self._plain_steps = 0 if step.has_trees else self._plain_steps + 1
        in_turn = self._plain_steps % LEARN_EVERY == 0
        yield in_turn and self.budget.looks_up(len(step.root_rows))
        self._learned = time.perf_counter() - started

    def draft(self, source: DraftSource, batch: DraftBatch) -> list[TokenTree]:
        """The nodes to verify for each of the requests that want drafts: as many as pay, which may be none."""
        trees = self._drafted(source, batch) if batch.request_ids else []
        self._ended = time.perf_counter()
        return trees

    def _drafted(self, source: DraftSource, batch: DraftBatch) -> list[TokenTree]:
        budget, skipped = self.budget, self.budget.skipped_passes
        lengths = np.array([len(tokens) for tokens in batch.token_ids])
        requests, reads = len(lengths), int(lengths.sum())
        started = time.perf_counter()
        found = None
        if budget.looks_up(requests):
            least = budget.least_worth(batch.request_ids, reads)
            found = source.look_up(replace(batch, least=least))
        if found is not None:
            budget.text.spend(requests, reads, time.perf_counter() - started + self._learned)
        probabilities = [tree.path_probabilities() for tree in found or ()]
        choice = budget.choose(batch.request_ids, lengths, probabilities)
        if not skipped and budget.skipped_passes:
            logger.info(DOES_NOT_PAY, requests)
        if choice.drafted:
            self._looked_up.difference_update(batch.request_ids)
            return self._by_a_pass(source, batch, choice, reads)
        if found is None or not choice.looked_up:
            return [_NO_TREE] * requests
        self._looked_up.update(batch.request_ids)
        return [tree.kept(nodes) for tree, nodes in zip(found, choice.looked_up, strict=True)]

    def _by_a_pass(
        self, source: DraftSource, batch: DraftBatch, choice: Choice, reads: int
    ) -> list[TokenTree]:
        started = time.perf_counter()
        part = batch.of(choice.drafted)
        trees = source.propose(part)
        probabilities = [tree.path_probabilities() for tree in trees]
        named = list(zip(part.request_ids, probabilities, strict=True))
        kept = self.budget.cut(choice, len(batch.request_ids), reads, named)
        drafted = [_NO_TREE] * len(batch.request_ids)
        for place, tree, nodes in zip(choice.drafted, trees, kept, strict=True):
            drafted[place] = tree.kept(nodes)
        read_by_pass = sum(len(tokens) for tokens in part.token_ids)
        self.budget.maps.spend(len(trees), read_by_pass, time.perf_counter() - started)
        return drafted

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self.budget.forget(request_id)
        self._looked_up.discard(request_id)
