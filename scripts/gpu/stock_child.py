# SPDX-License-Identifier: Apache-2.0
"""The child processes of call 3: ``stock_child.py imports|exact|beside cpu|cuda``, with vLLM."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import torch
from common import append
from kernel_child import NODES, attempt, layer_of
from kernel_times import Bench, default_variant
from timing import launch_us

MODULES = (
    "vllm",
    "vllm.platforms",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.vllm_flash_attn",
    "vllm.model_executor.models.llama",
    "vllm_hidden_transfer.engine.configuration",
    "vllm_hidden_transfer.engine.cuda",
    "accelerate",
    "gguf",
)
SHAPES = [
    (requests, context, nodes)
    for context in (1024, 8192, 32768)
    for requests in (1, 8, 32)
    for nodes in NODES
    if requests * context <= 32 * 8192
]
QUICK_SHAPES = [(2, 40, 7)]


def imports() -> None:
    """Every module that calls 4 to 7 need, and whether vLLM will find the plugin."""
    for name in MODULES:
        attempt("import", name, lambda name=name: bool(importlib.import_module(name)))  # type: ignore[misc]

    def plugin() -> str:
        (found,) = entry_points(group="vllm.general_plugins", name="hidden_transfer")
        return found.value

    def kind() -> str:
        from vllm_hidden_transfer.engine.devices import kind

        return kind()

    attempt("import", "the plugin's entry point", plugin)
    attempt("import", "device", kind)


def exact(device: str) -> None:
    """Rows against vLLM's Triton kernel, bit for bit."""
    from tests.support.kernel_cases import exact_rows_of

    for dtype in (torch.float32, torch.bfloat16):
        for seed in range(3):

            def work(dtype: torch.dtype = dtype, seed: int = seed) -> dict[str, int]:
                rows = exact_rows_of(seed, dtype, device)
                return {
                    "rows": len(rows.exact),
                    "exact": sum(rows.exact),
                    "masked": sum(rows.masked),
                }

            attempt("exact", str(dtype), work)


def stock_kernels() -> dict[str, Callable[..., Any]]:
    """FlashAttention 3 and the Triton kernel of vLLM on causal rows, by name; what is missing is appended."""
    found: dict[str, Callable[..., Any]] = {}

    def flash() -> None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        found["FA3"] = partial(flash_attn_varlen_func, fa_version=3)

    def triton() -> None:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        scales = dict.fromkeys(("q_descale", "k_descale", "v_descale"))
        found["Triton"] = partial(unified_attention, softcap=0, window_size=(-1, -1), **scales)

    attempt("import", "FlashAttention 3", flash)
    attempt("import", "Triton unified attention", triton)
    return found


def on_chain(
    stock: Callable[..., Any], bench: Bench, rows: int, out: torch.Tensor
) -> list[Callable[[], Any]]:
    """Stock's kernel on the first rows of every request, once for each place in the cache."""
    starts = bench.starts * rows // (bench.nodes + 1)
    q = bench.q[: int(starts[-1])]
    return [
        partial(
            stock,
            q=q,
            k=bench.keys,
            v=bench.values,
            out=out[: len(q)],
            cu_seqlens_q=starts,
            max_seqlen_q=rows,
            seqused_k=bench.seq_lens,
            max_seqlen_k=bench.length,
            softmax_scale=bench.scale,
            causal=True,
            block_table=table,
        )
        for table in bench.tables
    ]


def beside(device: str) -> None:
    """The engine's launch beside stock's kernels on a chain of as many rows, and on one row."""
    kernels = stock_kernels()
    units = torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 4
    for requests, context, nodes in SHAPES if device == "cuda" else QUICK_SHAPES:

        def work(requests: int = requests, context: int = context, nodes: int = nodes) -> Any:
            bench = Bench(layer_of(device), requests, context, nodes, device)
            variant = default_variant(bench.layer, requests, nodes, units)
            ours, stock = torch.empty_like(bench.q), torch.empty_like(bench.q)
            row: dict[str, Any] = {"ours us": launch_us(bench.launches(variant, ours))}
            bench.make_chains()
            bench.launches(variant, ours)[0]()
            for name, kernel in kernels.items():
                one = launch_us(on_chain(kernel, bench, 1, stock))
                launches = on_chain(kernel, bench, nodes + 1, stock)
                row |= {f"{name} chain us": launch_us(launches), f"{name} 1 row us": one}
                launches[0]()
                difference = (ours - stock).float().norm() / stock.float().norm()
                row[f"to {name}"] = float(difference)
            return row

        attempt("beside", [requests, context, nodes], work)


def main() -> None:
    kind, device = sys.argv[1:]
    if kind == "imports":
        imports()
    elif kind == "exact":
        exact(device)
    else:
        beside(device)
    append("ended", name=kind)


if __name__ == "__main__":
    main()
