# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder of work: two would append to the same prefixes and overwrite each other's state."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_hidden_transfer.training.parallel import Processes

LOCK_FILE = "lock"


@contextmanager
def sole_run(folder: Path, processes: Processes) -> Iterator[None]:
    """Hold the folder for the processes of this run; the first one holds it for all.

    The kernel gives it back when that process ends, however it ends; the file stays and means nothing by itself.

    Raises:
        ValueError: another run has it; every process of this one raises, so that none waits for the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    with path.open("a+", encoding="utf-8") as file:
        taken = processes.first and not _locked(file.fileno())
        if processes.any(taken):
            file.seek(0)
            owner = file.read().strip()
            raise ValueError(
                f"another `train`{f' (process {owner})' if owner else ''} is at work in {folder}: wait for it, or name "
                "another folder with --work"
            )
        if processes.first:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
