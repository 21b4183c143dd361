# SPDX-License-Identifier: Apache-2.0
"""Sampled texts under V2 against the target's exact probabilities: a small companion of the test of V1.

False alarms: one chi-square test at p < 1e-4, with fixed seeds.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.doubles.planted import GuessingSource
from tests.statistics.test_distribution import (
    FALSE_ALARM_RATE,
    exact_probabilities,
    goodness_of_fit,
)
from tests.support.engines import counters_of, engine, planted_options
from tests.support.models import random_model
from tests.support.under_v2 import under_v2

pytestmark = pytest.mark.engine

PROMPT = [3, 5, 4, 7, 6, 3]
SAMPLES, LENGTH = 300, 3
SOURCE = "tests.doubles.planted:GuessingSource"


def texts_and_accepted(target: Path) -> tuple[Counter[tuple[int, ...]], int]:
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=1.0, seed=seed, max_tokens=LENGTH, ignore_eos=True, detokenize=False
        )
        for seed in range(SAMPLES)
    ]
    with engine(target, max_num_seqs=64, **planted_options(5, SOURCE)) as llm:
        prompts = [{"prompt_token_ids": PROMPT}] * SAMPLES
        answers = llm.generate(prompts, params, use_tqdm=False)
        texts = Counter(tuple(answer.outputs[0].token_ids) for answer in answers)
        return texts, counters_of(llm).accepted_tokens


def test_sampled_texts_are_the_targets(tmp_path: Path) -> None:
    target = random_model(tmp_path / "tiny", layers=2, vocabulary=GuessingSource.vocabulary)
    texts, accepted = under_v2(texts_and_accepted, target)
    assert sum(texts.values()) == SAMPLES
    assert accepted > SAMPLES / 4
    cells, p_value = goodness_of_fit(texts, exact_probabilities(target, PROMPT, LENGTH))
    assert cells > 10
    assert p_value > FALSE_ALARM_RATE
