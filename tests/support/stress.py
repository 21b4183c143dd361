# SPDX-License-Identifier: Apache-2.0
"""Random engines under random requests, each drawn from a number: for ``tests/engine/test_stress.py``.

The same number is the same engine, the same requests and the same drafts on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.models import VOCABULARY

LONGEST = 256
"""Tokens of prompt and answer together at most."""


@dataclass(frozen=True)
class Ask:
    """One request: a prompt, so many seeded answers or a greedy one, and their length."""

    prompt: list[int]
    tokens: int
    answers: int = 1

    @property
    def sampling(self) -> dict[str, Any]:
        common = {"max_tokens": self.tokens, "ignore_eos": True, "detokenize": False}
        if self.answers == 1:
            return {**common, "temperature": 0.0}
        return {**common, "temperature": 1.0, "seed": self.prompt[0], "n": self.answers}


@dataclass(frozen=True)
class Draw:
    """An engine and what it is asked."""

    asks: list[Ask]
    nodes: int
    real_drafts: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        drafts = "maps" if self.real_drafts else "planted"
        answers = sum(ask.answers for ask in self.asks)
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return (
            f"{len(self.asks)} prompts, {answers} answers, {self.nodes} nodes, {drafts}, {options}"
        )


def prompt_of(rng: np.random.Generator, size: int) -> list[int]:
    return [int(token) for token in rng.integers(3, VOCABULARY, size)]


def known_deaths() -> list[Draw]:
    """Loads that killed an engine once."""
    rng = np.random.default_rng(0)
    equal = [Ask(prompt_of(rng, 20), 100) for _ in range(5)]
    return [
        # Many rows at the edge of their last block at once: no scratch blocks left for pseudo rows.
        Draw(
            [Ask(prompt_of(rng, 30), 8, answers=100)],
            4,
            real_drafts=True,
            options={"num_gpu_blocks_override": 120, "max_num_seqs": 100, "block_size": 32},
        ),
        # A request that the token budget leaves out keeps its tree beside the newer ones.
        Draw(
            equal,
            16,
            options={
                "max_num_batched_tokens": 68,
                "max_num_seqs": 8,
                "block_size": 32,
                "num_gpu_blocks_override": 40,
            },
        ),
    ]


def draw(number: int) -> Draw:
    """The engine of this number; the first ones are ``known_deaths``."""
    deaths = known_deaths()
    if number < len(deaths):
        return deaths[number]
    rng = np.random.default_rng([20261126, number])

    def one_of(*values: int) -> int:
        return int(rng.choice(values))

    block = one_of(32, 64, 128)
    least = LONGEST // block
    seqs = one_of(1, 3, 8, 32, 100)
    whole = bool(rng.random() < 0.2)
    options = {
        "block_size": block,
        "max_num_seqs": seqs,
        "num_gpu_blocks_override": least + 2 + one_of(0, 2, 8, 40, 200),
        "max_num_batched_tokens": LONGEST if whole else seqs + one_of(0, 3, 20, 68, 200),
        "enable_prefix_caching": bool(rng.random() < 0.5),
    }
    if whole:
        options["enable_chunked_prefill"] = False
    shared = prompt_of(rng, one_of(0, 40, 130))
    asks = []
    for _ in range(one_of(1, 4, 12, 30)):
        size = one_of(1, 15, 30, 31, 32, 33, 64, 100)
        asks.append(Ask([*shared, *prompt_of(rng, size)], one_of(1, 2, 9, 24)))
    if rng.random() < 0.4:
        asks.append(Ask(prompt_of(rng, one_of(5, 30, 64)), 6, answers=one_of(2, 16, 100)))
    nodes = one_of(1, 4, 16, 40)
    return Draw(asks, nodes, real_drafts=bool(rng.random() < 0.4), options=options)


def answer(llm: Any, asks: Sequence[Ask]) -> list[list[list[int]]]:
    """The token ids of every answer to every request, all asked at once."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": ask.prompt} for ask in asks],
        [SamplingParams(**ask.sampling) for ask in asks],
        use_tqdm=False,
    )
    return [[list(each.token_ids) for each in output.outputs] for output in outputs]


def left_behind(llm: Any) -> dict[str, int]:
    """What an idle engine still holds that it should not: blocks, requests, trees."""
    core = llm.llm_engine.engine_core.engine_core
    while (
        core.scheduler.has_requests()
    ):  # workers hear of finished requests in the step that follows
        core.step()
    pool = core.scheduler.kv_cache_manager.block_pool
    runner = core.model_executor.driver_worker.worker.model_runner
    held = {
        # One block is vLLM's own placeholder.
        "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "requests": len(core.scheduler.requests),
        "trees": len(runner.trees),
        "rows": len(runner.requests),
    }
    return {name: count for name, count in held.items() if count}


def stress_target(folder: Path) -> Path:
    """Two layers, so that the host's part is most of the time."""
    from tests.support.models import random_model

    return random_model(folder / "llama", layers=2)
