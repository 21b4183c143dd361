# SPDX-License-Identifier: Apache-2.0
"""Which kinds of devices there are for us, which worker serves on each, and what is asked for to try a GPU.

The GPU path ran under Triton's interpreter and was compiled for GPUs, but never ran on one, so it is off until somebody
asks for it: a wrong text would be the worst that this plugin can do.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OVERRIDE_VARIABLE = "VLLM_HIDDEN_TRANSFER_ALLOW_UNTESTED_GPU"
GPU_BUDGETS = (31, 15, 7)
"""Nodes of a tree at most on a GPU where the user names none: with the root they fill a kernel's lanes exactly."""
ON_GPUS = ("FLASH_ATTN", "TRITON_ATTN")
"""vLLM's attention backends that have trees there."""

Kind = Literal["CPU", "GPU", "other"]

_WORKERS = {
    "CPU": "vllm_hidden_transfer.engine.cpu.HiddenTransferCPUWorker",
    "GPU": "vllm_hidden_transfer.engine.cuda.HiddenTransferGPUWorker",
}

logger = logging.getLogger("vllm.hidden_transfer")


def kind() -> Kind:
    """What vLLM runs on in this process."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "CPU"
    return "GPU" if current_platform.is_cuda_alike() else "other"


def worker_cls() -> str:
    """Our worker for this machine."""
    return _WORKERS.get(kind(), _WORKERS["CPU"])


def gpu_allowed() -> bool:
    """Whether somebody asked for a GPU in so many words."""
    return os.environ.get(OVERRIDE_VARIABLE) == "1"


def warn_of_gpu() -> None:
    """Say what was asked for; nothing on a CPU."""
    if kind() != "GPU":
        return
    lines = (
        "UNTESTED on GPUs: hidden_transfer's GPU path ran under Triton's interpreter only.",
        f"It goes on because {OVERRIDE_VARIABLE}=1 is set.",
        "It may fail to start, and its outputs may be wrong: compare them with speculation off.",
    )
    rule = "!" * max(map(len, lines))
    logger.warning("\n%s", "\n".join((rule, *lines, rule)))


def default_budget(of_checkpoint: int) -> int:
    """Nodes of a tree where the user names no number."""
    if kind() != "GPU":
        return of_checkpoint
    return next((size for size in GPU_BUDGETS if size <= of_checkpoint), of_checkpoint)


def preferred_attention_backend() -> str | None:
    """What a GPU is to attend with where the user did not say and vLLM's own choice would have no trees."""
    from vllm import envs
    from vllm.platforms import current_platform

    if kind() != "GPU":
        return None
    if envs.VLLM_BATCH_INVARIANT or current_platform.is_rocm():
        return "TRITON_ATTN"
    # vLLM takes FlashInfer from here on.
    return "FLASH_ATTN" if current_platform.has_device_capability(100) else None


def of_config(config: VllmConfig) -> dict[str, bool]:
    """What a GPU is not served with, by the names in ``refusals.SENTENCES``."""
    from vllm import envs

    if kind() != "GPU":
        return {}
    backend = config.attention_config.backend
    name = None if backend is None else backend.name
    return {
        "V1 on a GPU": not config.use_v2_model_runner,
        "quantised KV caches on a GPU": not config.cache_config.cache_dtype.startswith(
            ("auto", "float", "bfloat")
        ),
        "another attention backend": name is not None and name not in ON_GPUS,
        "batch invariance": bool(envs.VLLM_BATCH_INVARIANT) and name != "TRITON_ATTN",
    }
