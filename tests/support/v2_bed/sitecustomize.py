# SPDX-License-Identifier: Apache-2.0
"""Run vLLM 0.32's V2 model runner on a CPU, under Triton's interpreter: a functional test bed, 10 to 20 times slower
than V1.

Python imports this module at start when its folder is on PYTHONPATH; it acts where VLLM_V2_ON_CPU=1, before vLLM is
imported, in the test's child process and in every process that vLLM starts from there (``tests/support/under_v2.py``
sets both). Never set it for a V1 run: vLLM then believes that it has Triton and takes other code paths.

It cannot show CUDA graphs, the order of streams, compilation by Triton or a GPU's numerics.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

ASYNC_VARIABLE = "VLLM_V2_ON_CPU_ASYNC"
VARIABLE = "VLLM_V2_ON_CPU"


def install() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("TRITON_BACKENDS_IN_TREE", "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    _add_cpu_backend()
    _cast_masks_to_bool()
    _widen_products()
    _give_libdevice_bodies()
    _use_torch_top_k_top_p()
    _patch_language_once()
    _leave_out_idle_work()
    _change_the_platform()
    _claim_a_generation()


def _add_cpu_backend() -> None:
    """vllm/triton_utils/importing.py turns Triton off when no backend called cpu is active."""
    from triton import backends
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class InterpreterDriver(DriverBase):
        def __init__(self) -> None: ...

        @staticmethod
        def is_active() -> bool:
            return True

        def map_python_to_cpp_type(self, ty: Any) -> Any:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cpu", 0, 0)

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, *_: Any) -> int:
            return 0

        def get_device_interface(self) -> Any:
            import torch

            return torch.cpu

    InterpreterDriver.__abstractmethods__ = frozenset()
    backends.backends["cpu"] = backends.Backend(
        compiler=backends.backends["nvidia"].compiler, driver=InterpreterDriver
    )


def _cast_masks_to_bool() -> None:
    """Some of vLLM's kernels compute masks as int32, which the interpreter's numpy back end refuses."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    def as_bool(mask: Any) -> Any:
        if mask.data.dtype == np.bool_:
            return mask
        return TensorHandle(mask.data.astype(np.bool_), mask.dtype)

    load = Builder.create_masked_load
    store = Builder.create_masked_store
    atomic = Builder.create_atomic_rmw
    Builder.create_masked_load = lambda self, p, mask, *a, **k: load(
        self, p, as_bool(mask), *a, **k
    )
    Builder.create_masked_store = lambda self, p, v, mask, *a, **k: store(
        self, p, v, as_bool(mask), *a, **k
    )
    Builder.create_atomic_rmw = lambda self, op, p, v, mask, *a, **k: atomic(
        self, op, p, v, as_bool(mask), *a, **k
    )


def _widen_products() -> None:
    """The interpreter keeps bfloat16 as the integers of its bits, and ``tl.dot`` multiplies those: it answers nonsense
    without a word. Here operands become fp32, as the sum is."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = Builder.create_dot
    Builder.create_dot = lambda self, a, b, *more: dot(self, wide(a), wide(b), *more)


def _give_libdevice_bodies() -> None:
    """log1p and expm1 return None in the interpreter; the resampling kernel uses them."""
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def body(function: Callable[[Any], Any]) -> Callable[..., Any]:
        def call(x: Any, *_: Any, **__: Any) -> Any:
            data = function(x.handle.data).astype(x.handle.data.dtype)
            return tl.core.tensor(TensorHandle(data, x.handle.dtype), x.type)

        return call

    libdevice.log1p, libdevice.expm1 = body(np.log1p), body(np.expm1)


def _patch_language_once() -> None:
    """The interpreter rewires Triton's language for every launch and every call inside a kernel, a fifth of all time.
    Nothing here compiles kernels, so it may stay rewired."""
    from triton.runtime import interpreter

    class Kept:
        def restore(self) -> None: ...

    stock, kept, seen = interpreter._patch_lang, Kept(), set()

    def patch(function: Any) -> Any:
        if function.__module__ not in seen:
            stock(function)
            seen.add(function.__module__)
        return kept

    interpreter._patch_lang = patch


def _leave_out_idle_work() -> None:
    """The interpreter computes an overflow check for each integer operation whose outcome it ignores outside debugging,
    and builds a table for each look-up of a dtype: together half of all time."""
    import functools

    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    stock = interpreter._get_np_dtype
    of_scalar = functools.cache(stock)
    interpreter._get_np_dtype = lambda dtype: (
        stock(dtype) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)
    )


def _after_import(module: str, act: Callable[[Any], None]) -> None:
    """Call act(module) once, right after it has been imported."""

    class Hook(importlib.abc.MetaPathFinder):
        searching = False

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if name != module or Hook.searching:
                return None
            Hook.searching = True
            try:
                spec = importlib.util.find_spec(name)
            finally:
                Hook.searching = False
            assert spec is not None
            assert spec.loader is not None
            execute = spec.loader.exec_module

            def exec_module(loaded: Any) -> None:
                execute(loaded)
                act(loaded)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign, assignment]
            return spec

    sys.meta_path.insert(0, Hook())


def _use_torch_top_k_top_p() -> None:
    """The Triton top-k/top-p kernel does not run in the interpreter; stock's torch version does."""

    def act(module: Any) -> None:
        module.HAS_TRITON = False

    _after_import("vllm.v1.sample.ops.topk_topp_sampler", act)


def _change_the_platform() -> None:
    """The CPU platform forces async scheduling off: where the variable says so, keep what the test asked for. It also
    has workers import everything anew, which takes longer than the tests."""

    def act(module: Any) -> None:
        platform = module.CpuPlatform
        stock = platform.check_and_update_config.__func__

        def check_and_update_config(cls: Any, vllm_config: Any) -> None:
            wanted = vllm_config.scheduler_config.async_scheduling
            stock(cls, vllm_config)
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
            if os.environ.get(ASYNC_VARIABLE) == "1":
                vllm_config.scheduler_config.async_scheduling = wanted

        platform.check_and_update_config = classmethod(check_and_update_config)

    _after_import("vllm.platforms.cpu", act)


def _claim_a_generation() -> None:
    """vLLM's Triton attention asks torch for the GPU's generation to choose what it launches, and would end there."""

    def act(module: Any) -> None:
        module.get_device_capability = lambda *_: (9, 0)

    if "torch.cuda" in sys.modules:
        act(sys.modules["torch.cuda"])
    else:
        _after_import("torch.cuda", act)


if os.environ.get(VARIABLE) == "1":
    install()
