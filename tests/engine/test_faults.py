# SPDX-License-Identifier: Apache-2.0
"""Drafting that goes wrong at run time never changes an answer."""

from __future__ import annotations

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
    assert_identical(reference, texts, random_target, "float32")
    assert PoisonedSource.latest.unusable_rows > 100
    assert 0 < counters.drafts < 0.75 * 8 * 80  # a pass of a poisoned request has no drafts
