# SPDX-License-Identifier: Apache-2.0
"""Under V2 the output is that of V2 without speculation, greedy and sampled with a seed, with planted trees.

The functions named ``compare_...`` run in a process of their own and return what differed and how much was accepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.doubles import planted
from tests.engine.v2 import VOCABULARY
from tests.support.engines import (
    PLANTED,
    Texts,
    acceptance_length,
    assert_identical,
    counters_of,
    differences,
    engine,
    generate,
    planted_options,
    random_prompts,
)
from tests.support.under_v2 import under_v2

pytestmark = pytest.mark.engine

CHUNKED: dict[str, Any] = {
    "max_num_batched_tokens": 48,
    "enable_prefix_caching": True,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 64,
}
BOTH_SCHEDULERS = pytest.mark.parametrize("scheduler", ["async", "sync"])
FEWER = "tests.doubles.planted:FewerNodesSource"


@dataclass(frozen=True)
class Found:
    """One comparison."""

    reference: Texts
    texts: Texts
    acceptance_length: float
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    preemptions: int = 0
    prefix_hits: int = 0

    @classmethod
    def between(cls, llm: Any, reference: Texts, answer: Any) -> Found:
        """Compare what ``answer()`` generates, with the counters of that time."""
        before, others_before = counters_of(llm), _counters(llm)
        texts = answer()
        counters, others = counters_of(llm) - before, _counters(llm)
        return cls(
            reference,
            texts,
            acceptance_length(texts, counters),
            counters.drafts,
            counters.draft_tokens,
            counters.accepted_tokens,
            others["vllm:num_preemptions"] - others_before["vllm:num_preemptions"],
            others["vllm:prefix_cache_hits"] - others_before["vllm:prefix_cache_hits"],
        )

    @property
    def different(self) -> list[tuple[int, int]]:
        return differences(self.reference, self.texts)

    def judge(self, target: Path, dtype: str) -> None:
        """Of greedy texts. What parts by rounding is asked again of V1 without speculation."""
        assert_identical(self.reference, self.texts, target, dtype=dtype)


def _counters(llm: Any) -> dict[str, int]:
    names = ("vllm:num_preemptions", "vllm:prefix_cache_hits")
    return {m.name: int(m.value) for m in llm.get_metrics() if m.name in names}


@contextmanager
def planted_engine(target: Path, nodes: int, **options: Any) -> Iterator[Any]:
    source = options.pop("source", PLANTED)
    with engine(target, **options, **planted_options(nodes, source)) as llm:
        if "tensor_parallel_size" not in options:
            from vllm_hidden_transfer.engine.v2.runner import TreeRunnerV2

            worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
            assert isinstance(worker.model_runner, TreeRunnerV2)
        yield llm


def compare_greedy(
    target: Path, answers: Path, dtype: str, asynchronous: bool, count: int, tokens: int
) -> list[Found]:
    """8 and 16 nodes, chunked prompts, a prefix cache, more prompts than slots; then fewer nodes than the budget."""
    options = {"dtype": dtype, "async_scheduling": asynchronous, **CHUNKED}
    prompts = random_prompts(count, vocabulary=VOCABULARY, longest=70)
    with engine(target, **options) as llm:
        reference = generate(llm, prompts, max_tokens=tokens)
    reference.plant(answers, VOCABULARY)
    found = []
    with planted_engine(target, 16, **options) as llm:
        for nodes in (16, 8):
            planted.PlantedSource.limit = nodes
            found.append(
                Found.between(llm, reference, lambda: generate(llm, prompts, max_tokens=tokens))
            )
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@BOTH_SCHEDULERS
@pytest.mark.scope("v2", "greedy-{scheduler}-{dtype}")
def test_greedy(
    dtype: str, scheduler: str, tiny_target: Path, tmp_path: Path, record_property: Any
) -> None:
    asynchronous = scheduler == "async"
    found = under_v2(
        compare_greedy,
        *(tiny_target, tmp_path / "answers.json", dtype, asynchronous, 8, 64),
        async_scheduling=asynchronous,
    )
    for one in found:
        one.judge(tiny_target, dtype)
        assert one.acceptance_length >= 2
        assert one.draft_tokens < 16 * one.drafts, "the scheduler cut no tree"
    assert found[1].prefix_hits > 0
    record_property("acceptance_length", round(found[0].acceptance_length, 2))


PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2}
OFTEN = dict.fromkeys((5, 9, 17, 33, 65, 129), 6.0)
"""Makes these so likely that they come again within a path: only then its own penalties matter."""
ROWS: dict[str, dict[str, Any]] = {
    "cool": {"temperature": 0.7, "top_p": 0.9},
    "hot": {"temperature": 1.0, "top_p": 0.9, "top_k": 50},
    "penalties": {"temperature": 0.7, "logit_bias": OFTEN, **PENALTIES},
    "shaped": {
        "temperature": 0.8,
        "min_p": 0.05,
        "logit_bias": {5: 2.0, 9: -3.0},
        "min_tokens": 12,
        "stop_token_ids": list(range(3, 64)),
    },
    "logprobs": {"temperature": 0.7, "logprobs": 3},
}


def sampled(llm: Any, prompts: list[list[int]], row: str, alone: bool) -> tuple[Texts, list[Any]]:
    """Texts of a row, every prompt with a seed of its own, and the logprobs of their tokens."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            seed=100 + index, max_tokens=20, ignore_eos=True, detokenize=False, **ROWS[row]
        )
        for index in range(len(prompts))
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    pairs = list(zip(requests, params, strict=True))
    groups = [[pair] for pair in pairs] if alone else [pairs]
    answers = [
        answer.outputs[0]
        for group in groups
        for answer in llm.generate([r for r, _ in group], [p for _, p in group], use_tqdm=False)
    ]
    logprobs = [
        [sorted((token, value.logprob, value.rank) for token, value in place.items())]
        for answer in answers
        for place in answer.logprobs or ()
    ]
    return Texts(prompts, [list(answer.token_ids) for answer in answers]), logprobs


def compare_sampled(target: Path, answers: Path, asynchronous: bool) -> dict[str, Found]:
    """All rows, in a batch and (the first) alone; the logprobs of a path must be those of no speculation."""
    options = {"async_scheduling": asynchronous, **CHUNKED}
    prompts = random_prompts(4, vocabulary=VOCABULARY, longest=40)
    with engine(target, **options) as llm:
        references = {row: sampled(llm, prompts, row, False) for row in ROWS}
    references["cool"][0].plant(answers, VOCABULARY)  # an engine wants the file at its start
    found = {}
    with planted_engine(target, 12, **options) as llm:
        for row, (reference, logprobs) in references.items():
            reference.plant(answers, VOCABULARY)
            seen: list[Any] = []

            def answer(row: str = row, seen: list[Any] = seen, alone: bool = False) -> Texts:
                texts, values = sampled(llm, prompts, row, alone)
                seen[:] = values
                return texts

            found[row] = Found.between(llm, reference, answer)
            assert seen == logprobs, row
            if row == "cool":
                found["alone"] = Found.between(llm, reference, lambda a=answer: a(alone=True))
    return found


@BOTH_SCHEDULERS
@pytest.mark.scope("v2", "seeded-{scheduler}")
def test_a_seed_gives_the_text_of_no_speculation(
    scheduler: str, tiny_target: Path, tmp_path: Path, record_property: Any
) -> None:
    asynchronous = scheduler == "async"
    found = under_v2(
        compare_sampled,
        *(tiny_target, tmp_path / "answers.json", asynchronous),
        async_scheduling=asynchronous,
    )
    assert set(found) == {*ROWS, "alone"}
    for row, one in found.items():
        assert one.different == [], row
        assert one.acceptance_length >= (1.5 if row == "shaped" else 2), row
    record_property("acceptance_length", round(found["cool"].acceptance_length, 2))


def compare_crowded(target: Path, answers: Path, asynchronous: bool) -> list[Found]:
    """A cache too small for its requests; then trees of any number of nodes in slots used over and over."""
    options = {
        "async_scheduling": asynchronous,
        **CHUNKED,
        "num_gpu_blocks_override": 11,
        "max_model_len": 128,
    }
    prompts = random_prompts(8, vocabulary=VOCABULARY, lengths=[20, 33, 8, 40, 15, 28, 36, 11])
    with engine(target, **options) as llm:
        reference = generate(llm, prompts, max_tokens=80)
    reference.plant(answers, VOCABULARY)
    with planted_engine(target, 8, source=FEWER, **options) as llm:
        return [
            Found.between(llm, reference, lambda: generate(llm, prompts, max_tokens=80))
            for _ in range(2)
        ]


@BOTH_SCHEDULERS
@pytest.mark.scope("v2", "preemption-{scheduler}")
def test_preemption_and_slots_used_again(
    scheduler: str, tiny_target: Path, tmp_path: Path, record_property: Any
) -> None:
    asynchronous = scheduler == "async"
    found = under_v2(
        compare_crowded,
        *(tiny_target, tmp_path / "answers.json", asynchronous),
        async_scheduling=asynchronous,
    )
    for one in found:
        one.judge(tiny_target, "float32")
        assert one.acceptance_length >= 1.5
    assert sum(one.preemptions for one in found) >= 10
    record_property("acceptance_length", round(found[0].acceptance_length, 2))


def compare_tensor_parallel(target: Path, answers: Path) -> list[Found]:
    """Two ranks, which must draw the same numbers and walk alike."""
    options = {**CHUNKED, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    prompts = random_prompts(2, vocabulary=VOCABULARY, longest=40)
    found = []
    with engine(target, **options) as llm:
        greedy = generate(llm, prompts, max_tokens=12)
        cool, _ = sampled(llm, prompts, "cool", False)
    Texts([*prompts, *prompts], [*greedy.outputs, *cool.outputs]).plant(answers, VOCABULARY)
    with planted_engine(target, 8, **options) as llm:
        found.append(Found.between(llm, greedy, lambda: generate(llm, prompts, max_tokens=12)))
        found.append(Found.between(llm, cool, lambda: sampled(llm, prompts, "cool", False)[0]))
    return found


@pytest.mark.scope("v2", "tensor_parallel")
def test_tensor_parallel(tiny_target: Path, tmp_path: Path, record_property: Any) -> None:
    found = under_v2(
        compare_tensor_parallel,
        *(tiny_target, tmp_path / "answers.json"),
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    greedy, cool = found
    greedy.judge(tiny_target, "float32")
    assert cool.different == []
    for one in found:
        assert one.accepted_tokens > 0
    record_property("acceptance_length", round(found[0].acceptance_length, 2))
