# SPDX-License-Identifier: Apache-2.0
"""Calls that wait for the device, counted by who makes them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import vllm_hidden_transfer

PACKAGE = Path(vllm_hidden_transfer.__file__).parent
CPU_ATTENTION = ("attention/cpu.py", "cpu_paths.py", "kv_store.py", "layout.py", "v2/cpu.py")
"""Where trees are laid out on the host: the CPU attention backend and what only it calls."""
WAITING = {
    *("item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "unique", "masked_select"),
    *("__bool__", "__int__", "__float__", "__index__", "__iter__", "__array__", "equal"),
}


class HostSyncs(TorchFunctionMode):
    """While active, notes every waiting call whose caller is in our package, as ``file:line call``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0
        """All calls of torch by our package, waiting or not."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        frame: Any = sys._getframe(1)
        file = Path(frame.f_code.co_filename)
        if PACKAGE in file.parents or PACKAGE.resolve() in file.parents:
            self.seen += 1
            where = file.as_posix()
            if _waits(func, args, kwargs or {}) and not where.endswith(CPU_ATTENTION):
                self.found.append(f"{file.name}:{frame.f_lineno} {func.__name__}")
        return func(*args, **(kwargs or {}))


def _waits(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in index)
    if name == "where":
        return len(args) == 1
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in WAITING
