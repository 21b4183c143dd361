# SPDX-License-Identifier: Apache-2.0
"""Seeded requests whose prompt is cut into chunks, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_hidden_transfer.patches.base import Patch, Surface

_RUNNER = "vllm.v1.worker.gpu_model_runner"


def unfinished_generators(runner: Any) -> dict[int, Any]:
    """The random generators of requests whose prompt does not end in this step, and their states before sampling."""
    batch = runner.input_batch
    if not batch.generators:
        return {}
    unfinished = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    return {
        request: batch.generators[request].get_state()
        for request in unfinished
        if request in batch.generators
    }


@contextmanager
def rewound(runner: Any, states: dict[int, Any]) -> Iterator[None]:
    """Around stock's bookkeeping: hides these generators from it and gives them back as they were."""
    generators = runner.input_batch.generators
    hidden = {request: generators.pop(request) for request in states}
    try:
        yield
    finally:
        for request, generator in hidden.items():
            generator.set_state(states[request])
        generators.update(hidden)


PATCH = Patch(
    name="seeded_chunks",
    why="vLLM samples for unfinished prompts too and takes the draw back by moving the generator's offset, which a "
    "CPU generator does not have: 'CPU Generator does not use offset', also without speculation.",
    how="Our CPU runner keeps the generator's state and restores it around stock's _bookkeeping_sync.",
    versions="0.32",
    retired_by="vLLM rewinds CPU generators by their state (tests/engine/test_stock_bugs.py notices)",
    surfaces=(
        Surface(_RUNNER, "GPUModelRunner._bookkeeping_sync"),
        Surface(_RUNNER, "GPUModelRunner._sample", ("logits", "spec_decode_metadata")),
    ),
)
