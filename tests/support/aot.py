# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels for GPUs that are not there: ``python -m tests.support.aot [quick] [ARCH...]``.

It needs neither a GPU nor CUDA: Triton's wheel brings ptxas and cuobjdump. It prints a line of JSON for each kernel,
case and target; quick leaves most of them out. Not under TRITON_INTERPRET, which leaves nothing to compile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_hidden_transfer.engine.attention.kernels.ancestors import (
    ancestor_words_kernel,
    num_words,
)
from vllm_hidden_transfer.engine.attention.kernels.compaction import compact_kernel
from vllm_hidden_transfer.engine.attention.kernels.exact_rows import TILE, exact_rows_kernel
from vllm_hidden_transfer.engine.attention.kernels.tree_attention import (
    choose_block_m,
    join_splits_kernel,
    tree_attention_kernel,
)

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
"""Bytes of shared memory that a program can have; a launch with more fails."""
NO_E4M3 = ("sm_80", "gfx942")
"""These have no such fp8, or another one."""
PRODUCTS = r"\b(?:HMMA|HGMMA|QGMMA|UTC\w*MMA)\b|v_mfma"
"""Instructions of tensor cores."""


@dataclass(frozen=True)
class Source:
    """A kernel as a launch would have it compiled."""

    kernel: Any
    case: str
    constants: dict[str, Any]
    pointer: Callable[[str], str]
    """The type of a pointer by its name."""
    options: dict[str, Any] = field(default_factory=dict)
    quick: tuple[str, ...] = ("sm_90",)
    """For which targets it is compiled in a quick look."""

    def compile(self, target: GPUTarget) -> Any:
        signature = {
            p.name: "constexpr"
            if p.is_constexpr
            else self.pointer(p.name)
            if p.name.endswith("_ptr")
            else p.annotation_type
            for p in self.kernel.params
        }
        # What a launch tells the compiler of pointers and strides, so that loads can be wide.
        wide = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(signature)
            if name.endswith("_ptr") or "_stride" in name or name.startswith("stride")
        }
        source = ASTSource(self.kernel, signature, constexprs=self.constants, attrs=wide)
        return triton.compile(source, target=target, options=self.options)


@dataclass(frozen=True)
class Report:
    """What the assembler made of a source."""

    kernel: str
    case: str
    arch: str
    registers: int
    stack: int
    """Bytes that are a thread's own in memory."""
    spills: int
    """NVIDIA: instructions that load or store registers there; AMD: spilled registers."""
    shared: int
    """Bytes."""
    products: int
    """Instructions of tensor cores."""
    async_copies: int
    """Instructions that copy to shared memory without registers; NVIDIA."""


def attention(
    case: str,
    *,
    dtype: str = "bf16",
    cache: str = "",
    heads: int = 32,
    kv_heads: int = 8,
    head_size: int = 128,
    rows: int = 16,
    tile: int = 64,
    splits: int = 8,
    window: int = 0,
    softcap: bool = False,
    sinks: bool = False,
    dense: bool = False,
    quick: tuple[str, ...] = (),
) -> Source:
    """Tree attention of an 8B Llama's shape by default, launched as ``tree_attention`` launches it."""

    def pointer(name: str) -> str:
        if name in ("k_ptr", "v_ptr"):
            return "*" + (cache or dtype)
        if name in ("q_ptr", "out_ptr", "own_k_ptr", "own_v_ptr", "sinks_ptr"):
            return "*" + dtype
        return "*fp32" if name.startswith(("part", "k_scale", "v_scale")) else "*i32"

    group = heads // kv_heads
    block_m = choose_block_m(rows, group)
    constants = {
        "HEADS": heads,
        "GROUP": group,
        "ROWS": rows,
        "WORDS": num_words(rows),
        "PAGE": 16,
        "HEAD": head_size,
        "HEAD_PAD": triton.next_power_of_2(head_size),
        "BLOCK_M": block_m,
        "TILE": tile,
        "SPLITS": splits,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "FP8": bool(cache),
        "SINKS": sinks,
        "DENSE": dense,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    options = {"num_warps": 8 if block_m >= 128 else 4, "num_stages": 2}
    return Source(tree_attention_kernel, case, constants, pointer, options, quick)


def exact(case: str, dtype: str) -> Source:
    """Exact rows of an 8B Llama's shape."""
    constants = {
        "GROUP": 4,
        "ROWS": 16,
        "DEPTHS": 16,
        "PAGE": 16,
        "HEAD": 128,
        "HEAD_PAD": 128,
        "BLOCK_M": 16,
        "TILE": TILE,
    }
    wide = ("q_ptr", "out_ptr", "k_ptr", "v_ptr")
    return Source(
        exact_rows_kernel, case, constants, lambda name: "*" + dtype if name in wide else "*i32"
    )


def sources() -> list[Source]:
    """Every kernel, attention in the shapes that matter."""
    return [
        attention("15 nodes", quick=tuple(TARGETS)),
        attention("31 nodes", rows=32),
        attention("63 nodes", rows=64),
        attention("window, cap, sinks", window=4096, softcap=True, sinks=True, quick=("sm_90",)),
        attention("draft pass", rows=4, dense=True),
        attention("no splits, small heads", heads=9, kv_heads=3, head_size=64, splits=1),
        attention("fp8 cache", cache="fp8e4nv"),
        attention("fp32", dtype="fp32", head_size=64, tile=16),
        exact("bf16", "bf16"),
        Source(
            join_splits_kernel,
            "8 splits",
            {"HEADS": 32, "HEAD": 128, "HEAD_PAD": 128, "SPLITS": 8},
            lambda name: {"out_ptr": "*bf16", "starts_ptr": "*i32"}.get(name, "*fp32"),
        ),
        Source(
            ancestor_words_kernel,
            "63 nodes",
            {"ROWS": 64, "WORDS": 2, "ROWS_PAD": 64},
            lambda name: "*i64" if name in ("parents_ptr", "slots_ptr") else "*i32",
        ),
        Source(
            compact_kernel,
            "15 nodes",
            {"DEPTHS": 15, "PAGE": 16, "WIDTH": 256, "WIDTH_PAD": 256},
            lambda name: "*bf16" if name == "like_ptr" else "*i64",
            {"num_warps": 1},
        ),
    ]


def report(source: Source, arch: str) -> Report:
    """Compile a source for a target and look at what came of it."""
    compiled = source.compile(TARGETS[arch])
    measure = _amd if TARGETS[arch].backend == "hip" else _nvidia
    return Report(
        source.kernel.__name__,
        source.case,
        arch,
        **measure(compiled),
        shared=compiled.metadata.shared,
    )


def _amd(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1])

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        "products": len(re.findall(PRODUCTS, text)),
        "async_copies": 0,
    }


def _nvidia(compiled: Any) -> dict[str, int]:
    # cuobjdump looks for nvdisasm, which lies beside it, on the PATH.
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [BIN / "cuobjdump", "-res-usage", "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PATH": path},
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text[:2000]
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "products": len(re.findall(PRODUCTS, text)),
        "async_copies": len(re.findall(r"\bLDGSTS\b", text)),
    }


def reports(archs: list[str], quick: bool) -> Iterator[Report]:
    """Of every source and target that goes with it."""
    for arch in archs:
        for source in sources():
            left_out = source.case == "fp8 cache" and arch in NO_E4M3
            if not left_out and (arch in source.quick or not quick):
                yield report(source, arch)


if __name__ == "__main__":
    names = sys.argv[1:]
    for one in reports([name for name in names if name in TARGETS] or [*TARGETS], "quick" in names):
        print(json.dumps(asdict(one)), flush=True)
