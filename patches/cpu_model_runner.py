# SPDX-License-Identifier: Apache-2.0
"""Our model runner inside vLLM's CPU worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_hidden_transfer.patches import log_lines
from vllm_hidden_transfer.patches.base import Patch, Surface


@contextmanager
def replaced_by(runner_class: type, *, v2: bool) -> Iterator[None]:
    """While this lasts, the CPU worker makes ``runner_class`` its V1 or V2 model runner."""
    module = _module(v2)
    PATCH.check()
    stock = module.CPUModelRunner
    module.CPUModelRunner = runner_class
    try:
        with log_lines.left_out():
            yield
    finally:
        module.CPUModelRunner = stock


def _module(v2: bool) -> Any:
    """Where the CPU worker finds its runner: its own global for V1, an import at the time for V2."""
    from vllm.v1.worker import cpu_worker

    if not v2:
        return cpu_worker
    from vllm.v1.worker.cpu import model_runner

    return model_runner


PATCH = Patch(
    name="cpu_model_runner",
    why="The CPU worker builds its runner from a module global; the GPU worker has a method for it.",
    how="Swaps vllm.v1.worker.cpu_worker.CPUModelRunner, under V2 vllm.v1.worker.cpu.model_runner.CPUModelRunner, "
    "while our worker's init_device runs.",
    versions="0.32",
    retired_by="a _make_model_runner method in CPUWorker, as in the GPU Worker",
    surfaces=(
        Surface("vllm.v1.worker.cpu_worker", "CPUModelRunner"),
        Surface("vllm.v1.worker.cpu_worker", "CPUWorker.init_device"),
    ),
)
