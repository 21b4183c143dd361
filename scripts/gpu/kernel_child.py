# SPDX-License-Identifier: Apache-2.0
"""The child processes of call 1: ``kernel_child.py cases|checks|compile|times cpu|cuda ...``. Imports no vLLM."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
from common import append
from kernel_times import LLAMA_8B, TINY, Bench, Layer, Variant, default_variant, variants
from timing import launch_us

from tests.support import kernel_cases

NODES = (7, 15, 31)
SHAPES = [
    (requests, context, nodes)
    for context in (1024, 8192, 32768)
    for requests in (1, 8, 32)
    for nodes in NODES
]
QUICK_SHAPES = [(2, 40, 7)]
CUDA_BROKE = 3
"""Exit status where the process's CUDA context is of no more use."""
CLOSE = 2e-2
"""Relative difference of two variants' results in bf16, at most."""


def attempt(kind: str, name: object, work: Callable[[], object]) -> None:
    """Do something and append how it went; end the process where CUDA broke."""
    try:
        found, said = work(), None
    except Exception as error:  # whatever it is, the next one goes on
        found, said = None, f"{type(error).__name__}: {error}"[:400]
    append(kind, name=name, found=found, said=said)
    if said is not None and "CUDA error" in said:
        sys.exit(CUDA_BROKE)


def random_cases(device: str, seeds: list[int]) -> None:
    for seed in seeds:
        case = kernel_cases.Case.draw(seed)

        def work(case: kernel_cases.Case = case) -> dict[str, object]:
            error = kernel_cases.attention_error(case, device)
            return {"dtype": str(case.dtype).removeprefix("torch."), "error": error}

        attempt("case", seed, work)


def other_checks(device: str) -> None:
    """Of the kernels beside attention."""
    nodes, paths = ((1, 33), 2) if device == "cpu" else ((1, 8, 31, 32, 63, 64, 127), 12)
    attempt("check", "ancestors", lambda: kernel_cases.check_ancestors(nodes, device))
    attempt("check", "a slot never written", lambda: kernel_cases.check_empty_slot(device))
    attempt("check", "compaction", lambda: kernel_cases.compacted(range(paths), device))


def layer_of(device: str) -> Layer:
    return TINY if device == "cpu" else LLAMA_8B


def swept(device: str, nodes: int) -> list[Variant]:
    found = variants(layer_of(device), nodes)
    return found[:8:4] if device == "cpu" else found


def compile_share(device: str, share: int, shares: int) -> None:
    """Fill Triton's cache with a share of what will be timed, beside other processes that do the same."""
    every = [(nodes, one) for nodes in NODES for one in swept(device, nodes)]
    for nodes, variant in every[share::shares]:
        bench = Bench(layer_of(device), 1, 64, nodes, device)
        launch = bench.launches(variant, torch.empty_like(bench.q))[0]
        attempt("compiled", [nodes, asdict(variant)], launch)


def copy_rate(device: str) -> float:
    """Bytes a second that a copy on the device moves, read and written."""
    size = (1 << 30) if device == "cuda" else (1 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (1e-6 * launch_us([lambda: target.copy_(source)]))


def times(device: str) -> None:
    """Every shape: the engine's own launch, the best of the sweep, and how long its bytes take."""
    rate = copy_rate(device)
    append("rate", bytes_per_second=rate)
    units = 4
    if device == "cuda":
        units = torch.cuda.get_device_properties(0).multi_processor_count
    for requests, context, nodes in SHAPES if device == "cuda" else QUICK_SHAPES:
        layer = layer_of(device)
        bench = Bench(layer, requests, context, nodes, device)
        first = default_variant(layer, requests, nodes, units)
        expected, out = torch.empty_like(bench.q), torch.empty_like(bench.q)
        default_us = launch_us(bench.launches(first, expected))
        bench.launches(first, expected)[0]()
        found = []
        for variant in swept(device, nodes):
            programs = requests * layer.kv_heads * variant.splits
            if variant.splits > 1 and programs > 16 * units:
                continue
            try:
                launches = bench.launches(variant, out)
                us = launch_us(launches)
            except Exception as error:  # too much shared memory, say: the next one goes on
                append(
                    "refused", name=asdict(variant), said=f"{type(error).__name__}: {error}"[:400]
                )
                continue
            launches[0]()
            apart = float((out - expected).float().norm() / expected.float().norm())
            found.append({**asdict(variant), "us": us, "apart": apart})
        good = [one for one in found if one["apart"] < CLOSE]
        best = min(good, key=lambda one: one["us"], default=None)
        append(
            "time",
            requests=requests,
            context=context,
            nodes=nodes,
            default={**asdict(first), "us": default_us},
            best=best,
            wrong=len(found) - len(good),
            floor_us=1e6 * bench.bytes / rate,
            swept=found,
        )


def main() -> None:
    kind, device, *rest = sys.argv[1:]
    if kind == "cases":
        random_cases(device, [int(seed) for seed in rest])
    elif kind == "checks":
        other_checks(device)
    elif kind == "compile":
        compile_share(device, *(int(number) for number in rest))
    else:
        times(device)


if __name__ == "__main__":
    main()
