# SPDX-License-Identifier: Apache-2.0
"""The GPU adapter on CPU tensors: the mixin, the backend and the kernels that a GPU runs, under Triton's interpreter.

vLLM's CPU worker and V2 CPU runner stand in for the GPU's, and its Triton attention backend for the CPU's. Only in
processes of the V2 test bed (``under_v2``).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_hidden_transfer.engine import devices
from vllm_hidden_transfer.engine.cuda import BACKENDS
from vllm_hidden_transfer.engine.v2.device import DeviceTrees
from vllm_hidden_transfer.patches import attention_backend, cpu_model_runner


class BedRunner(DeviceTrees, CPUModelRunner):
    """On CPU tensors."""

    def _compute_units(self) -> int:
        return 4  # few splits: the interpreter runs one program after the other


class BedWorker(CPUWorker):
    """vLLM's CPU worker around it."""

    def init_device(self) -> None:
        with cpu_model_runner.replaced_by(BedRunner, v2=True):
            super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with attention_backend.replaced_by({"CPU_ATTN": BACKENDS["TRITON_ATTN"]}):
            super().load_model(*args, **kwargs)


def use() -> None:
    """From here on engines of this process that speculate with us run on the bed."""
    # The op that writes the cache asks torch for the GPU's generation.
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    path = f"{BedWorker.__module__}.{BedWorker.__name__}"
    devices.worker_cls = lambda: path


def runner_of(llm: Any) -> BedRunner:
    """The runner of an engine in this process."""
    core = llm.llm_engine.engine_core.engine_core
    found = core.model_executor.driver_worker.worker.model_runner
    assert isinstance(found, BedRunner)
    return found
