# SPDX-License-Identifier: Apache-2.0
"""Another vLLM than the installed one, as far as the plugin can see: of another version, or without one of its names.

Python imports this module at start when its folder is on PYTHONPATH, in the test's child process and in every process
that vLLM starts from there. OTHER_VLLM_VERSION is a version. OTHER_VLLM_WITHOUT is ``module:Dotted.name``, taken away
as soon as the module has been imported; the test chooses names that vLLM itself does without.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def pretend_version(version: str) -> None:
    """vllm/version.py imports its numbers from a generated module: this one is there first."""
    module: Any = ModuleType("vllm._version")
    module.__version__ = version
    module.__version_tuple__ = tuple(int(part) for part in version.split("."))
    sys.modules["vllm._version"] = module


class Without(importlib.abc.MetaPathFinder):
    """Takes a name away from a module once that is imported."""

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            owner: Any = module
            *parts, last = self.name.split(".")
            for part in parts:
                owner = getattr(owner, part)
            delattr(owner, last)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if version := os.environ.get("OTHER_VLLM_VERSION"):
    pretend_version(version)
if without := os.environ.get("OTHER_VLLM_WITHOUT"):
    sys.meta_path.insert(0, Without(*without.split(":")))
