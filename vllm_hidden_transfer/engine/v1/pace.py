# SPDX-License-Identifier: Apache-2.0
"""The budget (``drafting.budget``) on the V1 runner's steps: what it is told of them, and what it decides.

A step is timed from the end of the one before, scheduling included, until its tokens are known, and a draft pass from
then until its trees are there. Steps with a prompt in them are not told: what they cost says nothing of decoding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from vllm.logger import init_logger

from vllm_hidden_transfer.drafting.budget import Budget, Choice, Verified
from vllm_hidden_transfer.drafting.source import DraftBatch
from vllm_hidden_transfer.engine.announce import DOES_NOT_PAY
from vllm_hidden_transfer.engine.v1.step import Step
from vllm_hidden_transfer.tree import TokenTree

logger = init_logger("vllm.hidden_transfer")


class Pace:
    """One engine's budget.

    Args:
        max_nodes: of a tree.
        free: whether drafts are looked up, without a pass through the target.
    """

    def __init__(self, max_nodes: int, *, free: bool = False) -> None:
        self.budget = Budget(max_nodes, free=free)
        self._choice = Choice((), 0.0)
        self._requests = self._reads = 0
        self._pass_started = self._ended = 0.0
        self._drafting = (0, 0)

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
            node = walk.nodes[request]
            accepted = 0 if node < 0 else int(tree.depths[node])
            trees.append(Verified(request_ids[request], tree.path_probabilities(), accepted))
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

    def choose(
        self, requests: list[int], request_ids: Sequence[str], lengths: NDArray[np.integer]
    ) -> list[int]:
        """For which of some requests, by their rows in the batch, a draft pass is to run."""
        if not requests:
            return []
        known = lengths[requests].astype(np.int64)
        self._requests, self._reads = len(requests), int(known.sum())
        skipped = self.budget.skipped_passes
        self._choice = self.budget.choose([request_ids[one] for one in requests], known)
        if not skipped and self.budget.skipped_passes:
            logger.info(DOES_NOT_PAY, len(requests))
        self._pass_started = time.perf_counter()
        return [requests[place] for place in self._choice.drafted]

    def cut(self, batch: DraftBatch, trees: Sequence[TokenTree]) -> list[TokenTree]:
        """The nodes to verify of what was drafted for a batch."""
        reads = sum(len(tokens) for tokens in batch.token_ids)
        self._drafting = (len(batch.request_ids), reads)
        probabilities = [tree.path_probabilities() for tree in trees]
        named = list(zip(batch.request_ids, probabilities, strict=True))
        kept = self.budget.cut(self._choice, self._requests, self._reads, named)
        return [tree.kept(nodes) for tree, nodes in zip(trees, kept, strict=True)]

    def end(self) -> None:
        """The step's drafts are there, if it has any."""
        self._ended = time.perf_counter()
        requests, reads = self._drafting
        if requests:
            self.budget.observe_pass(requests, reads, self._ended - self._pass_started)
        self._drafting = (0, 0)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self.budget.forget(request_id)
