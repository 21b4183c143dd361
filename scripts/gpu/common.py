# SPDX-License-Identifier: Apache-2.0
"""What the calls share: where output goes, tables and child processes.

The machine has PyTorch and Triton but neither this project nor a network, so this needs the standard library and torch
only, and imports torch where it is used. Never ran on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
ROOM = Path(tempfile.gettempdir()) / "hidden-transfer-gpu"
"""What one call parks for the next: outside of the working tree, which every call brings anew."""
KIT = ROOM / "kit"
"""vLLM for CUDA, unpacked by call 3."""
BED = ROOT / "tests" / "support" / "v2_bed"
sys.path[:0] = [str(KIT), str(ROOT)]

LINES_VARIABLE = "HIDDEN_TRANSFER_GPU_LINES"
"""Where a child appends its results."""
INTERPRETED = {
    "PYTHONPATH": os.pathsep.join(map(str, (BED, ROOT))),
    "VLLM_V2_ON_CPU": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
}
"""Environment of a child that tries a call on a CPU, under Triton's interpreter."""

Row = dict[str, Any]


def parser(description: str | None, small: str) -> argparse.ArgumentParser:
    """With the option that tries a call without a GPU."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument(small, action="store_true", help="try it on a CPU, in small")
    return found


def need_gpu(name: str) -> None:
    """End the process, in one sentence, where there is no GPU."""
    try:
        import torch
    except ImportError:
        sys.exit(f"{name}: this Python has no torch, so nothing was measured.")
    if not torch.cuda.is_available():
        sys.exit(f"{name}: there is no GPU here, so nothing was measured.")


def need_kit(name: str) -> None:
    """End the process, in one sentence, where there is no vLLM."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        sys.exit(f"{name}: there is no vLLM here: unpack the kit first (call 3).")


def device_line() -> str:
    """The device and the versions that every figure goes with."""
    import torch
    import triton

    parts = [f"torch {torch.__version__}", f"Triton {triton.__version__}"]
    parts.append(f"Python {platform.python_version()}")
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        size = f"{found.multi_processor_count} multiprocessors, {found.total_memory >> 30} GiB"
        parts.insert(0, f"{found.name}, {size}, CUDA {torch.version.cuda}")
    else:
        parts.insert(0, "CPU under Triton's interpreter: the times mean nothing")
    try:
        parts.append(f"vLLM {metadata.version('vllm')}")
    except metadata.PackageNotFoundError:
        parts.append("no vLLM")
    return ", ".join(parts)


class Output:
    """The three files of a call: what it printed (.txt), its results (.jsonl), and everything else (.log).

    Args:
        name: of the call.
    """

    def __init__(self, name: str) -> None:
        folder = Path(os.environ.get("OUT") or ROOT / "work" / "gpu-out")
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self._text, self.lines, self.log = (
            folder / f"{name}{end}" for end in (".txt", ".jsonl", ".log")
        )
        for path in (self._text, self.lines, self.log):
            path.write_text("")
        self._started = time.monotonic()
        self.say(f"{name}: {device_line()}")

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self._text.open("a") as file:
            file.write(text + "\n")

    def seconds(self) -> float:
        """Since the call began."""
        return time.monotonic() - self._started

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Print rows of the same columns; numbers to the right."""
        if not rows:
            self.say(f"\n{title}: nothing was measured")
            return
        columns = list(rows[0])
        cells = [[_shown(row.get(column)) for column in columns] for row in rows]
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in [columns, ["-" * width for width in widths], *cells]
        ]
        self.say("\n".join(["", title, *lines]))

    def results(self, kind: str) -> list[Row]:
        """What children appended so far."""
        rows = [json.loads(line) for line in self.lines.read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]

    def child(
        self, name: str, command: Sequence[str], seconds: float, env: Mapping[str, str]
    ) -> bool:
        """Run a script of this folder in a process of its own; what it appended stays, however it ends.

        Args:
            name: for what is printed where it fails.
            command: the script and its arguments.
            seconds: after which it is killed with all that it started.
            env: environment variables beside this process's.

        Returns:
            Whether it ended well.
        """
        variables = {
            LINES_VARIABLE: str(self.lines),
            "PYTHONPATH": os.pathsep.join(map(str, (KIT, ROOT))),
        }
        began = self.log.stat().st_size
        with self.log.open("a") as log:
            child = subprocess.Popen(
                [sys.executable, "-u", str(HERE / command[0]), *command[1:]],
                env={**os.environ, **variables, **env},
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
            finally:
                code = child.poll()
                if code is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        if code == 0:
            return True
        from vllm_hidden_transfer.bench.engine_process import last_error_line

        why = f"ended after {seconds:.0f} s, its limit" if code is None else f"status {code}"
        with self.log.open() as log:
            log.seek(began)
            said = last_error_line(log.read())
        self.say(f"FAILED {name}: {why}: {said[:300]}")
        return False


def append(kind: str, **fields: Any) -> None:
    """From a child: one line of results, at once."""
    with Path(os.environ[LINES_VARIABLE]).open("a") as file:
        file.write(json.dumps({"kind": kind, **fields}) + "\n")


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.4g}"
    return "-" if value is None else str(value)
