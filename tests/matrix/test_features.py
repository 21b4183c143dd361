# SPDX-License-Identifier: Apache-2.0
"""Every row of every setting: answers with trees identical to those without speculation.

Both engines of a setting get the same options. Drafts are random trees of 16 nodes with the reference's continuation
among junk, so that long paths are accepted and most of each tree is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.doubles import planted
from tests.matrix.rows import BY_NAME, GREEDY, Row
from tests.matrix.settings import SETTINGS, Setting
from tests.support.answers import Answer, ask, assert_same
from tests.support.checkpoints import random_checkpoint
from tests.support.engines import (
    SMALL,
    Texts,
    acceptance_length,
    assert_identical,
    counters_of,
    engine,
    planted_options,
    random_prompts,
)
from tests.support.models import (
    VOCABULARY,
    add_tokenizer,
    random_adapter,
    random_model,
)
from vllm_hidden_transfer.machine import this_machine

pytestmark = pytest.mark.engine

BUDGET = 16
NUM_PROMPTS = 8
UNCUT = {"max_num_batched_tokens": 2048}
"""Of the reference only: stock dies of a seeded request whose prompt is cut into chunks (test_stock_bugs.py)."""
LONG_ENOUGH = 16
"""Requests of at least so many tokens must show an acceptance length of 2."""


def cases() -> Iterator[Any]:
    for setting in SETTINGS:
        marks = [pytest.mark.xdist_group(setting.name)]
        if setting.matrix:
            marks.append(pytest.mark.matrix)
        for row in setting.rows:
            yield pytest.param(setting, BY_NAME[row], id=f"{setting.name}-{row}", marks=marks)


@dataclass
class Reference:
    """What the engine without speculation answered to one row."""

    sampling: list[dict[str, Any]]
    answers: list[Answer]
    base: list[Answer]
    hits: int


@dataclass
class Pair:
    """The engines of one setting: the reference's answers, all taken, and the engine with trees, running."""

    setting: Setting
    target: Path
    prompts: list[list[int]]
    references: dict[str, Reference]
    answers_file: Path
    lora: list[Any] | None
    llm: Any = None

    def prompts_of(self, row: Row) -> list[list[int]]:
        if not row.second_turn:
            return self.prompts
        turns = self.references["greedy"].answers
        more = random_prompts(len(turns), seed=6, longest=20)
        return [[*turn.sequence, *prompt] for turn, prompt in zip(turns, more, strict=True)]

    def warm_up(self, row: Row) -> None:
        """Bring the prefix cache to where the reference's was, whichever rows were run before."""
        if row.second_turn:
            self.run(BY_NAME["greedy"])
        else:
            ask(
                self.llm, self.prompts, [{**GREEDY, "max_tokens": 1}] * len(self.prompts), self.lora
            )

    def run(self, row: Row) -> tuple[list[Answer], float, int, int]:
        """The row with trees: answers, acceptance length, accepted tokens, prefix-cache hits."""
        reference = self.references[row.name]
        ordered = [reference.base, reference.answers]
        sequences = [
            a.sequence for part in (ordered if row.runs_on else ordered[::-1]) for a in part
        ]
        planted.write_answers(self.answers_file, sequences, VOCABULARY)
        planted.PlantedSource.first = row.first
        before, hits = counters_of(self.llm), prefix_hits(self.llm)
        answers = ask(self.llm, self.prompts_of(row), reference.sampling, self.lora)
        spent = counters_of(self.llm) - before
        length = acceptance_length(texts_of(answers), spent)
        return answers, length, spent.accepted_tokens, prefix_hits(self.llm) - hits


def texts_of(answers: list[Answer]) -> Texts:
    return Texts([answer.prompt for answer in answers], [answer.token_ids for answer in answers])


def prefix_hits(llm: Any) -> int:
    return value_of(llm, "vllm:prefix_cache_hits")


def value_of(llm: Any, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def take_reference(llm: Any, row: Row, pair: Pair) -> Reference:
    base_sampling = [
        {**row.base, "seed": 100 + index} if row.base["temperature"] else dict(row.base)
        for index in range(len(pair.prompts))
    ]
    prompts, before = pair.prompts_of(row), prefix_hits(llm)
    base = ask(llm, prompts, base_sampling, pair.lora)
    tokenizer = llm.get_tokenizer()
    sampling = [
        {**own, **row.change(index, answer, tokenizer)}
        for index, (own, answer) in enumerate(zip(base_sampling, base, strict=True))
    ]
    answers = base
    if sampling != base_sampling:
        before = prefix_hits(llm)
        answers = ask(llm, prompts, sampling, pair.lora)
    assert row.shows(answers, tokenizer)
    return Reference(sampling, answers, base, prefix_hits(llm) - before)


def lora_requests(target: Path, adapters: int) -> list[Any]:
    """A random adapter for each prompt, in turn."""
    from vllm.lora.request import LoRARequest

    made = [
        LoRARequest(
            f"random-{seed}",
            seed,
            str(random_adapter(target.parent / f"adapter-{seed}", target, seed)),
        )
        for seed in range(1, adapters + 1)
    ]
    return [made[index % adapters] for index in range(NUM_PROMPTS)]


class Pairs:
    """The pair of the setting that is being asked; the one before is closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._pair: Pair | None = None

    def of(self, setting: Setting) -> Pair:
        if self._pair is None or self._pair.setting is not setting:
            self.close()
            self._pair = self._open(setting)
        return self._pair

    def close(self) -> None:
        self._pair = None
        self._stack.close()

    def _open(self, setting: Setting) -> Pair:
        target = setting.target(self._folder)
        options = {"skip_tokenizer_init": False, **setting.options}
        lora = lora_requests(target, setting.adapters) if setting.adapters else None
        prompts = random_prompts(NUM_PROMPTS, **{"seed": 5, **setting.prompts})
        pair = Pair(setting, target, prompts, {}, self._folder / f"{setting.name}.json", lora)
        self._stack.enter_context(mock.patch.dict(os.environ, setting.environment))
        with engine(target, **{**options, **UNCUT}) as llm:
            for name in setting.rows:
                pair.references[name] = take_reference(llm, BY_NAME[name], pair)
        planted.write_answers(pair.answers_file, [], VOCABULARY)
        planted.PlantedSource.limit = None
        drafting = planted_options(BUDGET)
        pair.llm = self._stack.enter_context(engine(target, **{**options, **drafting}))
        return pair


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    opened = Pairs(tmp_path_factory.mktemp("targets"))
    yield opened
    opened.close()


@pytest.mark.parametrize(("setting", "row"), [*cases()])
@pytest.mark.scope("{setting.name}", "{row.name}")
def test_identical(setting: Setting, row: Row, pairs: Pairs, record_property: Any) -> None:
    if setting.needs and setting.needs not in this_machine().flags:
        pytest.skip(f"stock vLLM refuses it on a CPU without {setting.needs}")
    pair = pairs.of(setting)
    reference = pair.references[row.name]
    pair.warm_up(row)
    preempted = value_of(pair.llm, "vllm:num_preemptions")
    answers, length, accepted, hits = pair.run(row)
    if setting.judged:
        expected, found = texts_of(reference.answers), texts_of(answers)
        assert_identical(expected, found, pair.target, **{**setting.options, **UNCUT})
    else:
        assert_same(reference.answers, answers)
    if setting.preempts:
        assert value_of(pair.llm, "vllm:num_preemptions") > preempted
    elif reference.answers is not reference.base or row.second_turn:
        assert hits == reference.hits
    if row.second_turn:
        assert hits > 0
    if row.outcome == "falls back":
        assert accepted == 0
    elif max(len(answer.token_ids) for answer in reference.answers) >= LONG_ENOUGH:
        assert length >= 2
    record_property("outcome", row.outcome)
    record_property("acceptance_length", round(length, 2))


@pytest.mark.matrix
def test_real_drafts_with_adapters(tmp_path: Path) -> None:
    """The draft pass runs the upper layers with each request's own adapter."""
    target = add_tokenizer(random_model(tmp_path / "target"))
    checkpoint = random_checkpoint(tmp_path / "maps", target)
    options = {
        "enable_lora": True,
        "max_lora_rank": 8,
        "max_loras": 2,
        "skip_tokenizer_init": False,
    }
    prompts = random_prompts(NUM_PROMPTS, seed=5)
    lora = lora_requests(target, 2)
    sampling = [dict(GREEDY)] * NUM_PROMPTS
    with engine(target, **options) as llm:
        reference = ask(llm, prompts, sampling, lora)
    maps = {
        "speculative_config": {
            "method": "hidden_transfer",
            "model": str(checkpoint),
            "always_draft": True,
        }
    }
    with engine(target, **options, **maps) as llm:
        answers = ask(llm, prompts, sampling, lora)
        counters = counters_of(llm)
    assert_same(reference, answers)
    assert counters.draft_tokens > counters.drafts > 0


@pytest.mark.xdist_group("default")
@pytest.mark.scope("default", "streamed")
def test_streamed_text(pairs: Pairs) -> None:
    """The pieces of detokenised text that a stream gives are the text of no speculation."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    pair = pairs.of(SETTINGS[0])
    reference = pair.references["greedy"]
    planted.write_answers(pair.answers_file, [a.sequence for a in reference.answers], VOCABULARY)
    llm_engine = pair.llm.llm_engine
    params = SamplingParams(**GREEDY, output_kind=RequestOutputKind.DELTA)
    for index, prompt in enumerate(pair.prompts):
        llm_engine.add_request(f"stream-{index}", {"prompt_token_ids": prompt}, params)
    texts = [""] * len(pair.prompts)
    pieces = 0
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            texts[int(output.request_id.removeprefix("stream-"))] += output.outputs[0].text
            pieces += 1
    assert texts == [answer.text for answer in reference.answers]
    assert pieces < GREEDY["max_tokens"] * len(pair.prompts) / 2  # several tokens a piece


@pytest.mark.matrix
@pytest.mark.scope("async_llm", "greedy")
def test_async_llm(tmp_path: Path) -> None:
    """``AsyncLLM``, which ``vllm serve`` is built on, with requests that come and go."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    target = add_tokenizer(random_model(tmp_path / "target"))
    prompts = random_prompts(NUM_PROMPTS, seed=5)
    with engine(target, skip_tokenizer_init=False) as llm:
        reference = ask(llm, prompts, [dict(GREEDY)] * NUM_PROMPTS)
    planted.write_answers(tmp_path / "a.json", [a.sequence for a in reference], VOCABULARY)

    async def ask_all() -> list[list[int]]:
        arguments = AsyncEngineArgs(
            model=str(target),
            **{**SMALL, "skip_tokenizer_init": False, **planted_options(BUDGET)},
        )
        serving = AsyncLLM.from_engine_args(arguments)
        try:
            return await asyncio.gather(
                *(one(serving, index, prompt) for index, prompt in enumerate(prompts))
            )
        finally:
            serving.shutdown()

    async def one(serving: Any, index: int, prompt: list[int]) -> list[int]:
        await asyncio.sleep(0.05 * index)
        ids: list[int] = []
        request = {"prompt_token_ids": prompt}
        async for output in serving.generate(request, SamplingParams(**GREEDY), f"r{index}"):
            ids = list(output.outputs[0].token_ids)
        return ids

    with mock.patch.dict(os.environ, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}):
        answers = asyncio.run(ask_all())
    assert answers == [answer.token_ids for answer in reference]
