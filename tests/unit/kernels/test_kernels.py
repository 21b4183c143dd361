# SPDX-License-Identifier: Apache-2.0
"""The kernels against plain arithmetic: under Triton's interpreter, and the same cases on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

from tests.support import kernel_cases
from tests.support.kernel_cases import Case, Request
from tests.support.under_v2 import under_v2

pytestmark = pytest.mark.slow

Result = TypeVar("Result")

ON = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
            ],
        ),
    ],
)
QUICK = 24
"""Random cases that every run of the tests looks at."""
ALL, STEP = 200, 44
"""Those of the matrix, and how many of them a test looks at."""


def on(device: str, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function of ``kernel_cases`` with a device: the CPU's in a process under the interpreter."""
    if device == "cpu":
        return under_v2(function, *arguments, device)
    return function(*arguments, device)


@ON
def test_attention(device: str, record_property: Any) -> None:
    worst = on(device, kernel_cases.attention_errors, range(QUICK))
    assert set(worst) == {"float32", "bfloat16", "float16"}
    record_property("worst", worst)


@pytest.mark.matrix
@pytest.mark.parametrize("first", range(QUICK, ALL, STEP))
@ON
def test_more_attention(first: int, device: str) -> None:
    on(device, kernel_cases.attention_errors, range(first, first + STEP))


def a_case(*requests: Request, **more: Any) -> Case:
    return Case(1, 8, 4, 2, 32, 16, torch.float32, requests, **more)


TREE = (-1, 0, 0, 1, -1, 3, 3, 4)


@pytest.mark.parametrize("splits", [1, 2])
@ON
def test_a_sequence_shorter_than_its_rows(splits: int, device: str) -> None:
    """So vLLM captures graphs: of lengths of 1. Rows then have no context, not one below the cache."""
    captured = Request(0, 9, TREE, has_drafts=True, captured=True)
    on(device, kernel_cases.attention_error, a_case(captured, captured, splits=splits))


@pytest.mark.parametrize("num_rows", [9, 21])
@ON
def test_nothing_below_the_window_is_read(num_rows: int, device: str) -> None:
    """Of a tree and of a prompt chunk; the window's first key is in the middle of a tile."""
    request = Request(45, num_rows, TREE, has_drafts=num_rows == 9)
    on(device, kernel_cases.attention_error, a_case(request, window=6))


@ON
def test_ancestors(device: str) -> None:
    on(device, kernel_cases.check_ancestors, (1, 8, 31, 32, 63, 64, 127))


@ON
def test_a_slot_that_was_never_written_ends(device: str) -> None:
    on(device, kernel_cases.check_empty_slot)


@ON
def test_compaction(device: str) -> None:
    assert on(device, kernel_cases.compacted, range(12)) > 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@ON
def test_exact_rows_have_the_bits_of_a_chain(dtype: torch.dtype, device: str) -> None:
    for seed in range(3):
        found = on(device, kernel_cases.exact_rows_of, seed, dtype)
        assert all(found.exact)
        assert len(found.exact) == 18
        # Were the masked kernel exact too, this would show nothing.
        assert not all(found.masked)


@pytest.mark.parametrize(
    ("more", "message"),
    [({"splits": 2}, "need parts"), ({"is_fp8": True}, "needs k_scale")],
    ids=["parts", "scales"],
)
def test_what_is_missing_is_said(more: dict[str, Any], message: str) -> None:
    from vllm_hidden_transfer.engine.attention.kernels.tree_attention import tree_attention

    dtype = kernel_cases.FP8 if more.pop("is_fp8", False) else torch.float32
    cache = torch.zeros(1, 16, 2, 32).to(dtype)
    ints, q = torch.zeros(2, dtype=torch.int32), torch.zeros(1, 4, 32)
    words = torch.zeros(1, 9, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        tree_attention(
            *(q, cache, cache, q, ints[None], ints[:1], ints, words, words[..., 0]),
            max_rows=1,
            scale=1.0,
            **more,
        )
