# SPDX-License-Identifier: Apache-2.0
"""Model families: which draft and verify identically, and what the others are told before any weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.doubles import planted
from tests.support.checkpoints import random_checkpoint
from tests.support.engines import (
    acceptance_length,
    assert_identical,
    counters_of,
    engine,
    generate,
    planted_options,
    random_prompts,
)
from tests.support.models import random_model

pytestmark = pytest.mark.engine

WORKING = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Qwen3Moe")
REFUSED = {
    "Gemma2": "does not hand out the hidden states",
    "Gemma3": "does not hand out the hidden states",
    "Mixtral": "does not hand out the hidden states",
    "Granite": "its layers take",
    "Olmo2": "decoder layers are not vLLM's own",
}
FAST = {"Llama", "Qwen3Moe"}
NUM_TOKENS = 48


def _marks(family: str) -> list[pytest.MarkDecorator]:
    return [] if family in FAST else [pytest.mark.matrix]


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=_marks(family)) for family in WORKING]
)
@pytest.mark.scope("family", "{family}")
def test_drafts_and_verifies_identically(family: str, tmp_path: Path, record_property: Any) -> None:
    """Planted trees, which are accepted, and two-pass drafts of random maps, which are made by the real draft pass."""
    target = random_model(tmp_path / "target", family, layers=4)
    checkpoint = random_checkpoint(tmp_path / "maps", target, layer=2)
    options: dict[str, Any] = {"max_num_batched_tokens": 64}
    prompts = random_prompts(4, seed=3)
    with engine(target, **options) as llm:
        reference = generate(llm, prompts, max_tokens=NUM_TOKENS)
    reference.plant(tmp_path / "answers.json")
    planted.PlantedSource.limit = None
    with engine(target, **options, **planted_options(16)) as llm:
        texts = generate(llm, prompts, max_tokens=NUM_TOKENS)
        length = acceptance_length(texts, counters_of(llm))
    assert_identical(reference, texts, target, **options)
    assert length >= 2
    maps = {
        "speculative_config": {
            "method": "hidden_transfer",
            "model": str(checkpoint),
            "always_draft": True,
        }
    }
    with engine(target, **options, **maps) as llm:
        texts = generate(llm, prompts, max_tokens=NUM_TOKENS)
        counters = counters_of(llm)
    assert_identical(reference, texts, target, **options)
    assert counters.draft_tokens > counters.drafts > 0
    record_property("acceptance_length", round(length, 2))


@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.scope("family", "{family}")
def test_is_refused_in_one_sentence(family: str, tmp_path: Path, record_property: Any) -> None:
    from vllm.engine.arg_utils import EngineArgs

    target = random_model(tmp_path / "target", family, layers=4)
    (target / "model.safetensors").unlink()  # no weights are read
    args = EngineArgs(
        model=str(target),
        skip_tokenizer_init=True,
        dtype="float32",
        speculative_config={"method": "hidden_transfer"},
    )
    with pytest.raises(ValueError, match=REFUSED[family]) as refusal:
        args.create_engine_config()
    assert "\n" not in str(refusal.value)
    record_property("outcome", "refused")
    record_property("sentence", str(refusal.value))
