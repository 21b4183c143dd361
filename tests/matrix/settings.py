# SPDX-License-Identifier: Apache-2.0
"""Engine features: how the engines of a pair (without speculation, with trees) are configured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.matrix.rows import REASONING, ROWS, THINK, THINK_END
from tests.support.models import VOCABULARY, add_tokenizer, random_model
from tests.support.quantised import quantised_llama

CHUNKED: Mapping[str, Any] = {"max_num_batched_tokens": 64, "enable_prefix_caching": True}
BOTH = ("greedy", "seeded")


@dataclass(frozen=True)
class Setting:
    """One engine feature, and the request features that it is asked with."""

    name: str
    title: str
    options: Mapping[str, Any] = field(default_factory=lambda: CHUNKED)
    rows: tuple[str, ...] = BOTH
    environment: Mapping[str, str] = field(default_factory=dict)
    target: Callable[[Path], Path] = lambda folder: add_tokenizer(random_model(folder / "llama"))
    adapters: int = 0
    """LoRA adapters, used by the requests in turn."""
    prompts: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``random_prompts``."""
    preempts: bool = False
    judged: bool = False
    """Greedy texts may part by rounding, which the judge tells from wrong; no row but greedy ones."""
    matrix: bool = True
    """Only in `make matrix`; else in `make test` too."""
    note: str = ""
    needs: str = ""
    """What stock vLLM itself needs of a CPU for it, as /proc/cpuinfo names it."""


def _sliding(folder: Path) -> Path:
    return add_tokenizer(random_model(folder / "sliding", "Mistral", sliding_window=48))


def reasoning_target(folder: Path) -> Path:
    """A target with two tokens more than the others: the beginning and the end of reasoning."""
    from transformers import AutoTokenizer

    target = add_tokenizer(random_model(folder / "reasoning", vocabulary=VOCABULARY + 2))
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.add_tokens([THINK, THINK_END], special_tokens=True) == 2
    tokenizer.save_pretrained(target)
    return target


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "default",
        "chunked prefill and prefix caching",
        {**CHUNKED, "max_logprobs": -1},
        tuple(row.name for row in ROWS),
        matrix=False,
    ),
    Setting(
        "whole",
        "prompts in one piece, no prefix cache",
        {"enable_chunked_prefill": True, "enable_prefix_caching": False},
        matrix=False,
    ),
    Setting(
        "bfloat16",
        "bf16 weights and KV cache",
        {**CHUNKED, "dtype": "bfloat16"},
        ("greedy",),
        judged=True,
        note="what parts must be rounding, as the judge of identity sees it (docs/losslessness.md)",
    ),
    Setting("compiled", "compiled (vLLM's default)", {**CHUNKED, "enforce_eager": False}),
    Setting(
        "preemption",
        "preemption and resume",
        {**CHUNKED, "max_model_len": 192, "num_gpu_blocks_override": 12},
        preempts=True,
        matrix=False,
    ),
    Setting(
        "edge",
        "the max_model_len edge",
        {**CHUNKED, "max_model_len": 96},
        ("greedy", "seeded", "n"),
        prompts={"longest": 94},
        matrix=False,
    ),
    Setting(
        "long_prompts",
        "prompts of one token and of nearly the maximum",
        {**CHUNKED, "max_model_len": 256},
        prompts={"lengths": (1, 250, 1, 120, 2, 200, 255, 33)},
    ),
    Setting(
        "multi_process",
        "the engine in a process of its own",
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        rows=("greedy", "seeded", "mixed"),
    ),
    Setting(
        "tensor_parallel",
        "tensor parallel 2 (mp)",
        {**CHUNKED, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        rows=("greedy", "seeded", "mixed"),
        environment={
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        },
    ),
    Setting(
        "lora",
        "LoRA adapters, two in a batch",
        {
            **CHUNKED,
            "enable_lora": True,
            "max_lora_rank": 8,
            "max_loras": 2,
            "max_num_batched_tokens": 256,
        },
        adapters=2,
        note="stock 0.32 on CPUs applies an adapter to requests without one in the same batch",
    ),
    Setting("sliding_window", "sliding-window attention", target=_sliding),
    *(
        Setting(
            f"reasoning_{parser}",
            f"a reasoning parser ({parser})",
            {**CHUNKED, "reasoning_parser": parser},
            (*BOTH, *(row.name for row in REASONING)),
            target=reasoning_target,
            note="requests with a thinking budget get no drafts",
        )
        for parser in ("qwen3", "deepseek_r1")
    ),
    Setting("fp8_kv", "fp8 KV cache", {**CHUNKED, "kv_cache_dtype": "fp8"}, needs="avx512f"),
    Setting(
        "quantised",
        "a quantised target (compressed-tensors, int8)",
        target=lambda folder: add_tokenizer(quantised_llama(folder / "int8")),
    ),
)
