# SPDX-License-Identifier: Apache-2.0
"""The distribution of sampled texts in the engine, with trees, against the target's exact probabilities.

False alarms: one chi-square test at p < 1e-4, so one in ten thousand, were the seeds not fixed. They are, so it passes
always or never on a given machine.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from tests.doubles.planted import GuessingSource
from tests.support.engines import counters_of, engine
from tests.support.models import random_model

pytestmark = pytest.mark.engine

SAMPLES = 12_000
LENGTH = 4
FALSE_ALARM_RATE = 1e-4


@torch.inference_mode()
def exact_probabilities(
    target: Path, prompt: list[int], length: int = LENGTH
) -> dict[tuple[int, ...], float]:
    """The target's probability of every text of some length at temperature 1."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    texts = list(itertools.product(range(GuessingSource.vocabulary), repeat=length))
    joint = torch.zeros(len(texts), dtype=torch.float64)
    for part in range(0, len(texts), 1024):
        chunk = torch.tensor(texts[part : part + 1024])
        ids = torch.cat([torch.tensor(prompt).expand(len(chunk), -1), chunk], dim=1)
        logits = model(ids[:, :-1]).logits[:, -length:].double().log_softmax(-1)
        joint[part : part + 1024] = logits.gather(-1, chunk[..., None]).sum((1, 2))
    return dict(zip(texts, joint.exp().tolist(), strict=True))


def goodness_of_fit(
    texts: Mapping[tuple[int, ...], int], expected: Mapping[tuple[int, ...], float]
) -> tuple[int, float]:
    """Cells (texts that are expected fewer than five times share one) and p-value of a chi-square test."""
    counts = np.array([texts.get(text, 0) for text in expected], dtype=float)
    means = np.array(list(expected.values())) * counts.sum()
    rare = means < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    means = np.append(means[~rare], means[rare].sum())
    return len(counts), float(chisquare(counts, means * counts.sum() / means.sum()).pvalue)


def test_sampled_texts_are_the_targets(tmp_path: Path) -> None:
    from vllm import SamplingParams

    target = random_model(tmp_path / "tiny", layers=2, vocabulary=GuessingSource.vocabulary)
    prompt = [3, 5, 4, 7, 6, 3]
    expected = exact_probabilities(target, prompt)
    assert sum(expected.values()) == pytest.approx(1)
    params = SamplingParams(
        temperature=1.0, n=100, max_tokens=LENGTH, ignore_eos=True, detokenize=False
    )
    options = {
        "speculative_config": {"method": "hidden_transfer", "num_speculative_tokens": 10},
        "additional_config": {
            "hidden_transfer": {"draft_source": "tests.doubles.planted:GuessingSource"}
        },
    }
    with engine(target, max_num_seqs=128, **options) as llm:
        answers = llm.generate(
            [{"prompt_token_ids": prompt}] * (SAMPLES // 100), params, use_tqdm=False
        )
        accepted = counters_of(llm).accepted_tokens
    texts = Counter(tuple(o.token_ids) for answer in answers for o in answer.outputs)
    assert sum(texts.values()) == SAMPLES
    assert accepted > SAMPLES / 4  # the trees took part

    cells, p_value = goodness_of_fit(texts, expected)
    assert cells > 100
    assert p_value > FALSE_ALARM_RATE
