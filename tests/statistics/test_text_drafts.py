# SPDX-License-Identifier: Apache-2.0
"""Sampled texts with drafts from the text against exact probabilities, as in `test_sampling_parameters`.

What is copied hangs on what was sampled before, and what is recycled on other requests' logits; neither on the random
numbers to come. The false-alarm rate is that module's, for both together.
"""

from __future__ import annotations

import pytest

from tests.statistics.test_sampling_parameters import (
    KINDS,
    SAMPLES_BESIDE_OTHERS,
    SETTINGS,
    Bench,
    enumerate_all,
    tiny_model,
)
from tests.support.engines import engine

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("always", [True, False], ids=["every step", "where it pays"])
def test_drafts_from_the_text(always: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All sampling parameters side by side in one batch."""
    target = tiny_model(tmp_path_factory.mktemp("tiny"))
    settings = list(SETTINGS.values())
    options = {"max_num_seqs": 128, "max_model_len": 64}
    way = {"method": "hidden_transfer", "sources": ["lookup", "recycling"], "always_draft": always}
    with engine(target, **options, speculative_config=way) as llm:
        bench = Bench(llm, enumerate_all(target))
        found, counters = bench.sample(settings, KINDS, 4, SAMPLES_BESIDE_OTHERS)
    if always:
        assert counters.accepted_tokens > 0.2 * counters.drafts > 0
    for setting, texts in zip(settings, found, strict=True):
        bench.assert_exact(setting, texts)
