# SPDX-License-Identifier: Apache-2.0
"""The GPU adapter on CPU tensors under Triton's interpreter: the texts are those of no speculation.

The functions named ``compare_...`` run in a process of their own (``under_v2``) on the bed of ``device_bed``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engine.v2 import VOCABULARY, test_identity
from tests.engine.v2.test_identity import CHUNKED, Found, sampled
from tests.support.engines import Texts, engine, generate, planted_options, random_prompts
from tests.support.under_v2 import under_v2

pytestmark = pytest.mark.engine


def compare_planted(target: Path, answers: Path, asynchronous: bool, nodes: int) -> list[Found]:
    """Prompts in chunks beside trees, a prefix cache, more prompts than slots; then seeds."""
    from tests.support import device_bed

    options = {"async_scheduling": asynchronous, **CHUNKED}
    prompts = random_prompts(6, vocabulary=VOCABULARY, longest=60)
    with engine(target, **options) as llm:
        greedy = generate(llm, prompts, max_tokens=24)
        cool, _ = sampled(llm, prompts[:2], "cool", False)
    both = [*greedy.prompts, *cool.prompts], [*greedy.outputs, *cool.outputs]
    Texts(*both).plant(answers, VOCABULARY)
    device_bed.use()
    with engine(target, **options, **planted_options(nodes)) as llm:
        device_bed.runner_of(llm)
        return [
            Found.between(llm, greedy, lambda: generate(llm, prompts, max_tokens=24)),
            Found.between(llm, cool, lambda: sampled(llm, prompts[:2], "cool", False)[0]),
        ]


@pytest.mark.parametrize(
    ("scheduler", "nodes"),
    [
        ("async", 7),
        ("sync", 15),
        pytest.param("async", 15, marks=pytest.mark.matrix),
        pytest.param("sync", 7, marks=pytest.mark.matrix),
    ],
)
@pytest.mark.scope("gpu", "planted-{scheduler}-{nodes}")
def test_planted_trees(
    scheduler: str, nodes: int, tiny_target: Path, tmp_path: Path, record_property: Any
) -> None:
    asynchronous = scheduler == "async"
    greedy, cool = under_v2(
        compare_planted,
        *(tiny_target, tmp_path / "answers.json", asynchronous, nodes),
        async_scheduling=asynchronous,
    )
    greedy.judge(tiny_target, "float32")
    assert cool.different == []
    assert min(greedy.acceptance_length, cool.acceptance_length) >= 1.8
    record_property("acceptance_length", round(greedy.acceptance_length, 2))


@dataclass
class Replayed:
    """What an engine answered whose decode steps were replays."""

    found: Found
    host_reads: list[str]
    launches: list[int]
    """Of Triton kernels in each captured step."""
    replays: int


def compare_replayed(target: Path, answers: Path, stale: bool) -> Replayed:
    """Uniform decode steps as (fake) captured graphs.

    stale: plant the error that this is for, ancestor words in tensors that are new every step.
    """
    import torch

    from tests.support import device_bed
    from tests.support.fake_graph import capture_everything
    from vllm_hidden_transfer.engine.attention.tree_backend import TreeRows

    options = {"async_scheduling": False, **CHUNKED, "max_num_seqs": 2}
    prompts = random_prompts(3, vocabulary=VOCABULARY, longest=60)
    with engine(target, **options) as llm:
        reference = generate(llm, prompts, max_tokens=20)
    reference.plant(answers, VOCABULARY)
    device_bed.use()
    with engine(target, **options, **planted_options(7)) as llm:
        runner = device_bed.runner_of(llm)
        graphs = capture_everything(runner)["steps"]
        if stale:
            stock = runner.set_batch_trees

            def elsewhere(batch: Any) -> None:
                rows = runner._tree_rows
                runner._tree_rows = TreeRows(
                    torch.zeros_like(rows.words), torch.zeros_like(rows.depths)
                )
                stock(batch)

            runner.set_batch_trees = elsewhere  # type: ignore[method-assign]
        found = Found.between(llm, reference, lambda: generate(llm, prompts, max_tokens=20))
    return Replayed(
        found,
        [read for graph in graphs for read in graph.host_reads],
        [graph.launches for graph in graphs],
        sum(graph.replays for graph in graphs),
    )


@pytest.mark.scope("gpu", "graphs")
def test_planted_trees_in_graphs(tiny_target: Path, tmp_path: Path) -> None:
    one = under_v2(compare_replayed, tiny_target, tmp_path / "answers.json", False)
    one.found.judge(tiny_target, "float32")
    assert one.found.acceptance_length >= 1.8
    assert one.host_reads == []
    assert one.replays > 5
    assert min(one.launches) > 0


def test_graphs_that_read_another_step_are_seen(tiny_target: Path, tmp_path: Path) -> None:
    """The check above can fail: a graph that reads words where no step writes them gives other texts."""
    one = under_v2(compare_replayed, tiny_target, tmp_path / "answers.json", True)
    assert one.replays > 5
    assert one.found.different != []


def on_bed(compare: str, *arguments: Any, exact: bool = False) -> Any:
    """One of ``test_identity``'s comparisons with the GPU adapter in place of the CPU's.

    exact: with the kernel whose rows have the bits of decoding without speculation.
    """
    from tests.support import device_bed

    device_bed.use()
    device_bed.BedRunner.exact = exact
    return getattr(test_identity, compare)(*arguments)


@pytest.mark.matrix
@pytest.mark.scope("gpu", "preemption")
def test_preemption_and_slots_used_again(
    tiny_target: Path, tmp_path: Path, record_property: Any
) -> None:
    arguments = tiny_target, tmp_path / "answers.json", True
    found = under_v2(on_bed, "compare_crowded", *arguments, async_scheduling=True, seconds=1200)
    for one in found:
        one.judge(tiny_target, "float32")
        assert one.acceptance_length >= 1.5
    assert sum(one.preemptions for one in found) >= 10
    record_property("acceptance_length", round(found[0].acceptance_length, 2))


@pytest.mark.matrix
@pytest.mark.scope("gpu", "tensor_parallel")
def test_tensor_parallel(tiny_target: Path, tmp_path: Path, record_property: Any) -> None:
    greedy, cool = under_v2(
        on_bed,
        *("compare_tensor_parallel", tiny_target, tmp_path / "answers.json"),
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    greedy.judge(tiny_target, "float32")
    assert cool.different == []
    assert min(greedy.accepted_tokens, cool.accepted_tokens) > 0
    record_property("acceptance_length", round(greedy.acceptance_length, 2))


def compare_exact(target: Path, answers: Path) -> list[Found]:
    found: list[Found] = on_bed(
        "compare_greedy", target, answers, "float32", False, 3, 24, exact=True
    )
    return found


@pytest.mark.matrix
@pytest.mark.scope("gpu", "exact-rows")
def test_exact_rows(tiny_target: Path, tmp_path: Path, record_property: Any) -> None:
    """The kernel for VLLM_BATCH_INVARIANT=1; that its rows have the bits is asked of ``test_kernels``."""
    for one in under_v2(compare_exact, tiny_target, tmp_path / "answers.json"):
        one.judge(tiny_target, "float32")
        assert one.acceptance_length >= 1.8
    record_property("acceptance_length", round(one.acceptance_length, 2))
