# SPDX-License-Identifier: Apache-2.0
"""Call 1: are the kernels right on this GPU, and how far from the byte floor are they? Needs no vLLM.

200 random cases against fp64, then one layer of an 8B shape in CUDA graphs, splits and tiles swept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from common import INTERPRETED, Output, Row, need_gpu, parser

CASES = 200
QUICK_CASES = 3
CASE_SECONDS, CHECK_SECONDS, COMPILE_SECONDS, TIME_SECONDS = 60, 40, 50, 80


def run_cases(
    output: Output, device: str, seeds: list[int], seconds: float, env: Mapping[str, str]
) -> None:
    """Some cases in a child, and in another one what is left where it broke."""
    until = output.seconds() + seconds
    while seeds and (left := until - output.seconds()) > 0:
        command = ["kernel_child.py", "cases", device, *map(str, seeds)]
        if output.child(f"cases from {seeds[0]} on", command, left, env):
            return
        done = {row["name"] for row in output.results("case")}
        behind = [seed for seed in seeds if seed not in done]
        # Where nothing was written, the first one ended the process.
        seeds = behind[1:] if behind == seeds else behind


def report_cases(output: Output, wanted: int) -> None:
    rows = output.results("case")
    good = [row["found"] for row in rows if row["said"] is None]
    output.say(f"\nrandom cases: {len(good)} right, {len(rows) - len(good)} wrong, of {wanted}")
    for dtype in sorted({found["dtype"] for found in good}):
        worst = max(found["error"] for found in good if found["dtype"] == dtype)
        output.say(f"  {dtype}: worst relative error {worst:.1e}")
    for row in [row for row in rows if row["said"] is not None][:5]:
        output.say(f"  case {row['name']}: {row['said'][:200]}")
    for row in output.results("check"):
        output.say(f"  {row['name']}: {'right' if row['said'] is None else row['said'][:200]}")


def time_row(row: Row) -> Row:
    best = row["best"] or dict.fromkeys(("us", "splits", "tile", "warps", "stages"))
    return {
        "requests": row["requests"],
        "context": row["context"],
        "K": row["nodes"],
        "engine us": row["default"]["us"],
        "its splits": row["default"]["splits"],
        "best us": best["us"],
        "splits": best["splits"],
        "tile": best["tile"],
        "warps": best["warps"],
        "stages": best["stages"],
        "floor us": row["floor_us"],
        "best / floor": None if best["us"] is None else best["us"] / row["floor_us"],
        "wrong": row["wrong"],
    }


def main() -> None:
    quick = parser(__doc__, "--quick").parse_args().quick
    if not quick:
        need_gpu("call 1")
    output = Output("call1_kernels")
    if shutil.which("nvidia-smi") and not quick:
        output.say(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    device, env = ("cpu", INTERPRETED) if quick else ("cuda", {})
    wanted = QUICK_CASES if quick else CASES
    workers = 1 if quick else min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for share in range(workers):
            seeds = list(range(share, wanted, workers))
            pool.submit(run_cases, output, device, seeds, CASE_SECONDS, env)
    output.child("checks", ["kernel_child.py", "checks", device], CHECK_SECONDS, env)
    report_cases(output, wanted)
    output.say(f"after {output.seconds():.0f} s")
    if not quick:
        with ThreadPoolExecutor(workers) as pool:
            for share in range(workers):
                command = ["kernel_child.py", "compile", device, str(share), str(workers)]
                pool.submit(output.child, f"share {share}", command, COMPILE_SECONDS, env)
        failed = [row for row in output.results("compiled") if row["said"] is not None]
        output.say(f"compiled for the sweep after {output.seconds():.0f} s; failed: {len(failed)}")
        for row in failed[:5]:
            output.say(f"  {row['name']}: {row['said'][:200]}")
    output.child("times", ["kernel_child.py", "times", device], TIME_SECONDS, env)
    for row in output.results("rate"):
        output.say(f"a copy moves {row['bytes_per_second'] / 1e12:.2f} TB/s, read and written")
    output.table(
        "one layer, medians of CUDA graph replays",
        [time_row(row) for row in output.results("time")],
    )
    output.say(f"call 1 took {output.seconds():.0f} s")


if __name__ == "__main__":
    main()
