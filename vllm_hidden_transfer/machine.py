# SPDX-License-Identifier: Apache-2.0
"""Which CPU and commit this is, and which dtype is fast on it. Every printed figure names its machine."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

BF16_FLAGS = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True)
class Machine:
    """The CPU as Linux describes it."""

    model: str
    flags: frozenset[str]
    cores: int
    """Cores that this process may use."""

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.flags.intersection(BF16_FLAGS) else "float32"

    @property
    def dtype_reason(self) -> str:
        for flag in BF16_FLAGS:
            if flag in self.flags:
                return f"this CPU multiplies bf16 itself ({flag})"
        return "this CPU has neither avx512_bf16 nor amx_bf16 and would emulate bf16"

    @property
    def vector_set(self) -> str:
        """The widest instruction set that matters to speed here."""
        for flag in (*BF16_FLAGS, "avx512f", "avx2"):
            if flag in self.flags:
                return flag
        return "no AVX2"

    def __str__(self) -> str:
        return f"{self.model} ({self.vector_set})"


def parse_cpuinfo(cpuinfo: str, cores: int) -> Machine:
    """Read /proc/cpuinfo; its first processor stands for all."""
    fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", cpuinfo.split("\n\n")[0], re.MULTILINE))
    return Machine(
        model=fields.get("model name", "unknown CPU"),
        flags=frozenset(fields.get("flags", "").split()),
        cores=cores,
    )


def this_machine() -> Machine:
    return parse_cpuinfo(Path("/proc/cpuinfo").read_text(), len(os.sched_getaffinity(0)))


def this_commit() -> str:
    """Short name of the checkout's commit in the current folder, with "-dirty" where tracked files differ from it."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=7"]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
