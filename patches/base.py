# SPDX-License-Identifier: Apache-2.0
"""What a patch is: a named, checked, idempotent change to one seam of vLLM."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from vllm_hidden_transfer.checkpoint.config import one_sentence
from vllm_hidden_transfer.versions import TESTED_SERIES

INSTEAD = (
    f"vllm-hidden-transfer was run with vLLM {TESTED_SERIES}.x: install vLLM {TESTED_SERIES}.0"
)


class MissingSurfaceError(RuntimeError):
    """vLLM lacks something that the plugin builds on."""


@dataclass(frozen=True)
class Surface:
    """A name in vLLM that we build on, with the parameters that we rely on if it is callable."""

    module: str
    name: str
    """Dotted below the module, for example ``EngineArgs.create_speculative_config``."""
    parameters: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises MissingSurfaceError where this vLLM does not have it."""
        where = f"{self.module}.{self.name}"
        try:
            found: object = importlib.import_module(self.module)
            for part in self.name.split("."):
                found = getattr(found, part)
        except Exception as error:  # importing a module of another vLLM may fail in any way
            raise MissingSurfaceError(
                f"hidden_transfer cannot run with this vLLM: {where} is not there "
                f"({one_sentence(str(error), limit=200)}); {INSTEAD}."
            ) from error
        if not self.parameters:
            return
        known = inspect.signature(found).parameters if callable(found) else {}
        missing = [name for name in self.parameters if name not in known]
        if missing:
            raise MissingSurfaceError(
                f"hidden_transfer cannot run with this vLLM: {where} takes no {', '.join(missing)}; "
                f"{INSTEAD}."
            )


_applied: set[str] = set()


@dataclass(frozen=True)
class Patch:
    """One change to vLLM's behaviour, with the reasons for it."""

    name: str
    why: str
    how: str
    versions: str
    """vLLM versions that it was run with."""
    retired_by: str
    """The upstream change that would make it unnecessary."""
    surfaces: tuple[Surface, ...]
    install: Callable[[], None] | None = None
    """What applies it; None for a patch that holds only while its context manager lasts."""

    def check(self) -> None:
        """Raises MissingSurfaceError unless everything it builds on is there."""
        for surface in self.surfaces:
            surface.check()

    def apply(self) -> None:
        """Check, then install, once a process."""
        if self.install is None or self.name in _applied:
            return
        self.check()
        self.install()
        _applied.add(self.name)
