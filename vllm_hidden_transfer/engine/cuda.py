# SPDX-License-Identifier: Apache-2.0
"""The GPU adapter: vLLM's GPU worker around a V2 model runner with trees. Never ran on a GPU."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_hidden_transfer.engine.v2.device import DeviceTrees
from vllm_hidden_transfer.patches import attention_backend

_ROOM = "vllm_hidden_transfer.engine.attention"
BACKENDS = {
    "FLASH_ATTN": f"{_ROOM}.flash_attn.TreeFlashAttentionBackend",
    "TRITON_ATTN": f"{_ROOM}.triton_attn.TreeTritonAttentionBackend",
}
"""By vLLM's name, what takes a backend's place."""


class TreeGPUModelRunner(DeviceTrees, GPUModelRunner):
    """Tree verification and two-pass drafting on a GPU."""


class HiddenTransferGPUWorker(Worker):
    """vLLM's GPU worker with our model runner and backends."""

    def _make_model_runner(self) -> GPUModelRunner:
        assert self.use_v2_model_runner  # configuration.py refuses the other
        assert self.device is not None
        return TreeGPUModelRunner(self.vllm_config, self.device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with attention_backend.replaced_by(BACKENDS):
            super().load_model(*args, **kwargs)
