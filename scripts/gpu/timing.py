# SPDX-License-Identifier: Apache-2.0
"""How long work takes: launches in CUDA graphs by the device's own events, and whole passes by the host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def launch_us(launches: Sequence[Callable[[], object]], rounds: int = 7) -> float:
    """Microseconds of one launch: the median of replays of a CUDA graph of all of them; on a CPU of plain calls.

    Args:
        launches: on different data, or what they read stays in the cache.
        rounds: of replays.
    """

    def once() -> None:
        for launch in launches:
            launch()

    if not torch.cuda.is_available():
        return 1e3 * synchronised_ms(once, rounds=1) / len(launches)  # means nothing, so be quick
    once()  # compiles what is not compiled yet, which a capture does not allow
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds + 1)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events[1:]]  # the first one warms up
    return 1e3 * statistics.median(times) / len(launches)


def synchronised_ms(work: Callable[[], object], rounds: int = 20) -> float:
    """Milliseconds from a call to the end of its work on the device, the host's part included: a median."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])
