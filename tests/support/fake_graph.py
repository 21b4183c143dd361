# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs without CUDA: capture writes down every operation with the very tensors it used, replay does them again.

As in a real graph, Python runs at capture only: addresses, shapes and numbers of the host are those of the capture, and
what a step computes elsewhere is not seen. What it cannot show: operations that a real capture refuses, memory that the
graph pool hands out twice, and streams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

HOST_READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}
"""Operations that wait for the device, which a captured region must not have."""

_launch = InterpretedFunction.run


class FakeGraph(TorchDispatchMode):
    """A tape of torch operations and Triton launches."""

    def __init__(self) -> None:
        super().__init__()
        self._replay: list[Callable[[], None]] = []
        self.launches = 0
        """Of Triton kernels, in the tape."""
        self.host_reads: list[str] = []
        self.replays = 0

    def capture(self, function: Callable[[], None]) -> None:
        with self, mock.patch.object(InterpretedFunction, "run", self._launcher()):
            function()

    def replay(self) -> None:
        self.replays += 1
        for step in self._replay:
            step()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in HOST_READS:
            self.host_reads.append(name)
        if "empty" not in name:  # memory, not values
            self._replay.append(lambda: _again(func, args, kwargs, found))
        return found

    def _launcher(self) -> Callable[..., Any]:
        tape = self

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            size = grid(kwargs) if callable(grid) else grid

            def launch() -> None:
                _launch(kernel, *args, grid=size, warmup=False, **kwargs)

            tape.launches += 1
            tape._replay.append(launch)
            with _disable_current_modes():
                return launch()

        return run


def _again(func: Any, args: Any, kwargs: Any, found: Any) -> None:
    """Repeat an operation and put what it gives where capture put it."""
    for old, new in zip(tree_leaves(found), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


@contextmanager
def captures() -> Iterator[None]:
    """While this lasts, vLLM's graph managers capture fake graphs."""

    def capture(
        self: CudaGraphManager, create_forward_fn: Any, progress_bar_desc: str = ""
    ) -> None:
        for desc in self._capture_descs[CUDAGraphMode.FULL]:
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            forward, graph = create_forward_fn(desc, warmup=False), FakeGraph()
            graph.capture(functools.partial(forward, CUDAGraphMode.NONE))
            self.graphs[desc] = graph
        self._graphs_captured = True

    pool = mock.patch.object(type(current_platform), "_global_graph_pool", object(), create=True)
    with mock.patch.object(CudaGraphManager, "capture", capture), pool, torch.inference_mode():
        yield


def capture_everything(runner: Any) -> dict[str, list[FakeGraph]]:
    """Give a runner without graphs those of its decode steps and of its draft passes, for each number of requests.

    Returns:
        The graphs by name, "steps" and "drafts".
    """
    config = runner.compilation_config
    rows = runner.decode_query_len
    sizes = {rows * count for count in range(1, runner.max_num_reqs + 1)}
    if drafts := runner.draft_source.draft_rows:
        sizes |= {drafts * count for count in range(1, runner.max_num_reqs + 1)}
    config.cudagraph_capture_sizes = sorted(sizes)
    config.max_cudagraph_capture_size = max(sizes)
    # Operations inside vLLM's opaque attention operation are seen only if it is not one.
    for layer in config.static_forward_context.values():
        layer.use_direct_call = True
    found: dict[str, list[FakeGraph]] = {}
    with captures():
        manager = ModelCudaGraphManager(
            runner.vllm_config,
            runner.device,
            CUDAGraphMode.FULL_DECODE_ONLY,
            decode_query_len=rows,
        )
        manager.capture(
            runner.model,
            runner.model_state,
            runner.input_buffers,
            None,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
            use_aux_hidden_state_outputs=runner.use_aux_hidden_state_outputs,
        )
        runner.cudagraph_manager = manager
        found["steps"] = [*manager.graphs.values()]
        runner.speculator.init_cudagraph_manager(CUDAGraphMode.FULL_DECODE_ONLY)
        runner.speculator.capture()
        if runner.speculator.graphs is not None:
            found["drafts"] = [*runner.speculator.graphs.graphs.values()]
    return found
