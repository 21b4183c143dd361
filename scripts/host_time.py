# SPDX-License-Identifier: Apache-2.0
"""What the host does in a step beside the model: trees, layout, walk and moves, without an engine.

CPU time of one thread (not wall time, so that neighbours on the machine do not count), the median of some rounds, on
random draft distributions of the demo checkpoint's shape: ``python scripts/host_time.py``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from vllm_hidden_transfer.drafting.bigram import BigramTables
from vllm_hidden_transfer.drafting.distributions import DraftCandidates
from vllm_hidden_transfer.machine import this_machine
from vllm_hidden_transfer.tree import (
    Scratch,
    TokenTree,
    VerificationWalk,
    fit_to_scratch,
    lay_out_paths,
    most_probable,
    path_major,
)

DEPTHS, WIDTH, BLOCK = 4, 64, 32
VOCABULARY, RANK = 49152, 64
POSITION = 200
BLOCKS_EACH = 8


def random_candidates(requests: int, seed: int) -> DraftCandidates:
    """Candidates as real drafts have them: sorted by marginal, re-weighted by the token before."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (requests, DEPTHS, WIDTH), generator=rng)
    logits = (-1.5 * torch.arange(1, WIDTH + 1).log()).expand(requests, DEPTHS, -1).contiguous()
    shape = (VOCABULARY, DEPTHS - 1, RANK)
    tables = BigramTables(
        *(torch.randn(shape, generator=rng) / RANK**0.25 for _ in ("before", "after"))
    )
    return DraftCandidates(tokens, logits, logits.logsumexp(-1) + 0.1, torch.ones(DEPTHS), tables)


class Step:
    """The host's part of one step for so many requests."""

    def __init__(self, requests: int, nodes: int) -> None:
        self.nodes = nodes
        self.candidates = random_candidates(requests, 1)
        self.before = np.ones(requests, dtype=np.int64)
        self.first = POSITION + np.arange(requests, dtype=np.int64) % BLOCK
        blocks = np.arange(requests * BLOCKS_EACH, dtype=np.int32).reshape(requests, BLOCKS_EACH)
        self.blocks = blocks
        behind = blocks.size
        spare = requests * nodes * 2
        self.scratch = Scratch(range(behind, behind + spare), behind + spare)
        self.trees: list[TokenTree] = self.build()
        self.rng = np.random.default_rng(1)

    def build(self) -> list[TokenTree]:
        return path_major(most_probable(self.candidates, self.nodes)).on_host()

    def lay_out(self) -> None:
        sizes = self.before + np.array([len(tree) for tree in self.trees])
        starts = np.concatenate([[0], np.cumsum(sizes)])
        room = len(self.scratch.blocks)
        trees = fit_to_scratch(self.trees, self.first, self.before, BLOCK, room)
        roots = starts[:-1]
        lay_out_paths(trees, roots, starts, self.first, self.blocks, BLOCK, self.scratch)

    def walk(self) -> None:
        walk = VerificationWalk(self.trees)
        while walk.active:
            nodes = [walk.nodes[request] for request in walk.active]
            walk.advance(
                [
                    int(self.trees[request].tokens[min(node + 1, self.nodes - 1)])
                    for request, node in zip(walk.active, nodes, strict=True)
                ]
            )
        for tree, node in zip(self.trees, walk.nodes, strict=True):
            tree.path(node).tolist()


def median_ms(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        started = time.thread_time()
        work()
        times.append((time.thread_time() - started) * 1e3)
    return statistics.median(times[1:])


def main(
    nodes: Annotated[int, typer.Option(help="nodes of a tree")] = 16,
    rounds: Annotated[int, typer.Option(help="rounds of each measurement")] = 30,
) -> None:
    """Print the host's milliseconds a step at 1, 8, 64 and 256 requests."""
    torch.set_num_threads(1)
    table = Table(title=f"host time a step, ms of CPU time, {nodes} nodes, {this_machine().model}")
    for column in ("requests", "build", "fit and lay out", "walk", "all"):
        table.add_column(column, justify="right")
    for requests in (1, 8, 64, 256):
        step = Step(requests, nodes)
        parts = [median_ms(part, rounds) for part in (step.build, step.lay_out, step.walk)]
        table.add_row(str(requests), *(f"{part:.2f}" for part in (*parts, sum(parts))))
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
