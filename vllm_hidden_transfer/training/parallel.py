# SPDX-License-Identifier: Apache-2.0
"""Data parallel training under ``torchrun``: every process takes its part of each step's sequences."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=365)
"""How long a process waits for the others. The first one fills caches and judges alone, for hours with a large target,
and torch's own limit (10 minutes with nccl, 30 with gloo) would kill the run. A process that died needs no limit to be
noticed: torchrun then ends all of them."""


@dataclass(frozen=True)
class Processes:
    """This process among the others; alone unless torchrun started several."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any process says so: all of them have to leave a loop together."""
        return bool(self.sum(torch.tensor(float(flag), device=self._device())))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in place."""
        if self.count > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def number_of_first(self, number: int) -> int:
        """The first process's number: what ranks compute alike on other machines may differ by rounding."""
        return int(self.from_first(torch.tensor(number, device=self._device())))

    def _device(self) -> str:
        alone = self.count == 1 or dist.get_backend() == "gloo"
        return "cpu" if alone else f"cuda:{torch.cuda.current_device()}"


@contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """Join the others that torchrun started (gloo on CPUs, nccl on GPUs); leave them at the end."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
