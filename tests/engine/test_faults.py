# SPDX-License-Identifier: Apache-2.0
"""Drafting that goes wrong at run time never changes an answer."""

from __future__ import annotations

import logging
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest

from tests.support.checkpoints import random_checkpoint
from tests.support.engines import (
    assert_identical,
    counters_of,
    engine,
    generate,
    planted_options,
    random_prompts,
)
from tests.support.poison import CHECKPOINT_VARIABLE, PoisonedSource

pytestmark = pytest.mark.engine


def test_nan_drafts_are_dropped_and_counted(
    random_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their keys and values lie in the request's own blocks until they are overwritten, and must not leak."""
    monkeypatch.setenv(
        CHECKPOINT_VARIABLE, str(random_checkpoint(tmp_path / "maps", random_target))
    )
    prompts = random_prompts(8)
    with engine(random_target) as llm:
        reference = generate(llm, prompts, max_tokens=80)
    source = f"{PoisonedSource.__module__}:{PoisonedSource.__name__}"
    with engine(random_target, **planted_options(8, source)) as llm:
        texts = generate(llm, prompts, max_tokens=80)
        counters = counters_of(llm)
    assert_identical(reference, texts, random_target)
    assert PoisonedSource.latest.unusable_rows > 100
    assert 0 < counters.drafts < 0.75 * 8 * 80  # a pass of a poisoned request has no drafts


def test_trees_cut_for_lack_of_scratch_are_told_once(random_target: Path, tmp_path: Path) -> None:
    """A small cache leaves room for the trees of 2 requests but not of 8: one warning, with the remedy."""
    prompts = random_prompts(8)
    with engine(random_target) as llm:
        reference = generate(llm, prompts, max_tokens=40)
    reference.plant(tmp_path / "answers.json")
    logger = logging.getLogger("vllm.hidden_transfer")
    log = BufferingHandler(capacity=10_000)  # caplog hears vLLM's loggers once or twice
    logger.addHandler(log)
    told = []
    try:
        with engine(random_target, num_gpu_blocks_override=96, **planted_options(16)) as llm:
            for group in (2, 8):
                texts = generate(llm, prompts, group=group, max_tokens=40)
                assert_identical(reference, texts, random_target)
                warnings = [line for line in log.buffer if line.levelno == logging.WARNING]
                told.append(sum("scratch blocks" in line.getMessage() for line in warnings))
    finally:
        logger.removeHandler(log)
    assert told == [0, 1]
