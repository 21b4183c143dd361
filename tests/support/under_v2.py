# SPDX-License-Identifier: Apache-2.0
"""Functions that run under vLLM's V2 model runner, in processes of their own.

V2 needs Triton, which has no CPU build here; ``v2_bed/sitecustomize.py`` lets it run under Triton's interpreter. That
changes the whole process, so no test module may import vLLM under it: a test hands a function to ``under_v2``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

ROOT = Path(__file__).parents[2]
BED = Path(__file__).with_name("v2_bed")
IMPORTED_ONCE = ["vllm.entrypoints.llm", "tests.support.engines"]
"""Modules whose import takes longer than many a test. Plugins act later, in the process of the test."""

Result = TypeVar("Result")


def under_v2(
    function: Callable[..., Result],
    *arguments: Any,
    async_scheduling: bool = False,
    environment: dict[str, str] | None = None,
    seconds: float = 600,
) -> Result:
    """Call a module's function in a new process whose vLLM runs V2; arguments and result are pickled.

    The processes are forked from a server of this process that has imported vLLM under the test bed.

    Args:
        async_scheduling: let vLLM keep async scheduling, which the CPU platform turns off.
        environment: more environment variables.
        seconds: how long it may take.

    Raises:
        AssertionError: with the end of the child's output, where it fails or takes longer.
    """
    more = {"VLLM_V2_ON_CPU_ASYNC": str(int(async_scheduling)), **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        call, answer, log = (Path(folder) / name for name in ("call", "answer", "log"))
        call.write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        child = _server().Process(target=_answer, args=(call, answer, log, more))
        child.start()
        assert child.pid is not None
        try:
            child.join(seconds)
        finally:
            # Itself where it did not end, and tensor-parallel workers, if it left any.
            child.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.join()
        said = log.read_text()[-6000:] if log.exists() else ""
        assert child.exitcode == 0, f"{function.__qualname__} failed under V2:\n{said}"
        result: Result = pickle.loads(answer.read_bytes())
        return result


def _server() -> ForkServerContext:
    """Starts the server once; what it imports and forks sees the test bed's variables."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    paths = [str(BED), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_V2_ON_CPU": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with mock.patch.dict(os.environ, variables):
        forkserver.ensure_running()
    return context


def _answer(call: Path, answer: Path, log: Path, environment: dict[str, str]) -> None:
    """What the child does: from the file of the call to that of the answer."""
    os.setsid()
    os.chdir(ROOT)
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    module, name, arguments = pickle.loads(call.read_bytes())
    result = getattr(importlib.import_module(module), name)(*arguments)
    answer.write_bytes(pickle.dumps(result))
