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
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
BED = Path(__file__).with_name("v2_bed")

Result = TypeVar("Result")


def under_v2(
    function: Callable[..., Result],
    *arguments: Any,
    async_scheduling: bool = False,
    environment: dict[str, str] | None = None,
    seconds: float = 600,
) -> Result:
    """Call a module's function in a new process whose vLLM runs V2; arguments and result are pickled.

    Args:
        async_scheduling: let vLLM keep async scheduling, which the CPU platform turns off.
        environment: more environment variables.
        seconds: how long it may take.

    Raises:
        AssertionError: with the end of the child's output, where it fails.
        subprocess.TimeoutExpired: where it takes longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        call, answer, log = (Path(folder) / name for name in ("call", "answer", "log"))
        call.write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        with log.open("w") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(call), str(answer)],
                env=_environment(async_scheduling, environment or {}),
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = child.wait(seconds)
            finally:
                # Tensor-parallel workers, if it left any.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        assert status == 0, f"{function.__qualname__} failed under V2:\n{log.read_text()[-6000:]}"
        result: Result = pickle.loads(answer.read_bytes())
        return result


def _environment(async_scheduling: bool, more: dict[str, str]) -> dict[str, str]:
    paths = [str(BED), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_V2_ON_CPU": "1",
        "VLLM_V2_ON_CPU_ASYNC": str(int(async_scheduling)),
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **more,
    }


def main(call: str, answer: str) -> None:
    module, name, arguments = pickle.loads(Path(call).read_bytes())
    result = getattr(importlib.import_module(module), name)(*arguments)
    Path(answer).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
