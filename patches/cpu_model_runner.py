# SPDX-License-Identifier: Apache-2.0
"""Our model runner inside vLLM's CPU worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm_hidden_transfer.patches.base import Patch, Surface


@contextmanager
def replaced_by(runner_class: type) -> Iterator[None]:
    """While this lasts, the CPU worker makes ``runner_class`` its model runner."""
    from vllm.v1.worker import cpu_worker

    PATCH.check()
    stock = cpu_worker.CPUModelRunner
    cpu_worker.CPUModelRunner = runner_class
    try:
        yield
    finally:
        cpu_worker.CPUModelRunner = stock


PATCH = Patch(
    name="cpu_model_runner",
    why="The CPU worker builds its runner from a module global; the GPU worker has a method for it.",
    how="Swaps vllm.v1.worker.cpu_worker.CPUModelRunner while our worker's init_device runs.",
    versions="0.32",
    retired_by="a _make_model_runner method in CPUWorker, as in the GPU Worker",
    surfaces=(
        Surface("vllm.v1.worker.cpu_worker", "CPUModelRunner"),
        Surface("vllm.v1.worker.cpu_worker", "CPUWorker.init_device"),
    ),
)
