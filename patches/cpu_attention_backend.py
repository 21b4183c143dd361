# SPDX-License-Identifier: Apache-2.0
"""Tree attention in place of vLLM's CPU attention backend, for the model of a worker that speculates with trees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm_hidden_transfer.patches.base import Patch, Surface


@contextmanager
def replaced_by(class_path: str) -> Iterator[None]:
    """Models loaded while this lasts attend through the backend ``class_path``."""
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    PATCH.check()
    register_backend(AttentionBackendEnum.CPU_ATTN, class_path)
    # The selector remembers its choices for the whole process, other engines' included.
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
        selector._cached_get_attn_backend.cache_clear()


PATCH = Patch(
    name="cpu_attention_backend",
    why="vLLM has no tree attention: its half-finished one was removed in PR 42121.",
    how="Registers a subclass of the CPU backend under the CPU backend's own name, through vLLM's public registry, "
    "while our worker loads its model: another engine in the same process keeps stock's.",
    versions="0.32",
    retired_by="tree attention in vLLM's CPU backend",
    surfaces=(
        Surface(
            "vllm.v1.attention.backends.registry", "register_backend", ("backend", "class_path")
        ),
        Surface(
            "vllm.v1.attention.backends.registry", "AttentionBackendEnum.CPU_ATTN.clear_override"
        ),
        Surface("vllm.v1.attention.selector", "_cached_get_attn_backend.cache_clear"),
    ),
)
