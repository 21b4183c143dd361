# SPDX-License-Identifier: Apache-2.0
"""Tree attention in place of vLLM's attention backends, for the model of a worker that speculates with trees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from vllm_hidden_transfer.patches.base import Patch, Surface


@contextmanager
def replaced_by(class_paths: Mapping[str, str]) -> Iterator[None]:
    """Models loaded while this lasts attend through the given backends.

    Args:
        class_paths: by vLLM's name of a backend (``CPU_ATTN``), module and class of the one that takes its place.
    """
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    PATCH.check()
    replaced = [AttentionBackendEnum[name] for name in class_paths]
    for backend, path in zip(replaced, class_paths.values(), strict=True):
        register_backend(backend, path)
    # The selector remembers its choices for the whole process, other engines' included.
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        for backend in replaced:
            backend.clear_override()
        selector._cached_get_attn_backend.cache_clear()


PATCH = Patch(
    name="attention_backend",
    why="vLLM has no tree attention: its half-finished one was removed in PR 42121.",
    how="Registers subclasses of stock backends under those backends' own names, through vLLM's public registry, "
    "while our worker loads its model: another engine in the same process keeps stock's.",
    versions="0.32",
    retired_by="tree attention in vLLM's own backends",
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
