# SPDX-License-Identifier: Apache-2.0
"""Seeded sampling with trees: the very text of no speculation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.doubles import planted
from tests.support.engines import (
    Texts,
    acceptance_length,
    counters_of,
    engine,
    planted_options,
    random_prompts,
)

pytestmark = pytest.mark.engine


def seeded(llm: Any, prompts: list[list[int]], batched: bool = True, **sampling: Any) -> Texts:
    """Complete every prompt with a seed of its own."""
    from vllm import SamplingParams

    requests = [
        (
            {"prompt_token_ids": prompt},
            SamplingParams(
                temperature=0.8,
                top_p=0.95,
                seed=100 + index,
                max_tokens=64,
                ignore_eos=True,
                detokenize=False,
                **sampling,
            ),
        )
        for index, prompt in enumerate(prompts)
    ]
    groups = [requests] if batched else [[request] for request in requests]
    outputs = []
    for group in groups:
        answers = llm.generate([r for r, _ in group], [p for _, p in group], use_tqdm=False)
        outputs += [list(answer.outputs[0].token_ids) for answer in answers]
    return Texts(prompts, outputs)


PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
}


def test_a_seed_gives_the_text_of_no_speculation(random_target: Path, tmp_path: Path) -> None:
    """Alone, in a batch, with 4 and 16 nodes, and run to run; with penalties and min_tokens too."""
    prompts = random_prompts(8)
    with engine(random_target) as llm:
        reference = seeded(llm, prompts)
        penalised = seeded(llm, prompts, min_tokens=40, stop_token_ids=[5, 6, 7, 8], **PENALTIES)
        assert seeded(llm, prompts, batched=False).outputs == reference.outputs
    answers = tmp_path / "answers.json"
    reference.plant(answers)
    with engine(random_target, **planted_options(16)) as llm:
        for nodes in (16, 4):
            planted.PlantedSource.limit = nodes
            before = counters_of(llm)
            batch = seeded(llm, prompts)
            counters = counters_of(llm) - before
            assert batch.outputs == reference.outputs
            assert acceptance_length(batch, counters) >= 2
            assert seeded(llm, prompts, batched=False).outputs == reference.outputs
        assert seeded(llm, prompts).outputs == reference.outputs
        penalised.plant(answers)
        before = counters_of(llm)
        again = seeded(llm, prompts, min_tokens=40, stop_token_ids=[5, 6, 7, 8], **PENALTIES)
        assert again.outputs == penalised.outputs
        assert (counters_of(llm) - before).accepted_tokens > 64
