# SPDX-License-Identifier: Apache-2.0
"""What `eval` says of the demo maps is what the engine does with them, draft vocabulary included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from tests.engine.test_demo_target import chat_prompts, with_maps
from tests.support.engines import counters_of, engine, generate
from vllm_hidden_transfer.checkpoint.maps import load_checkpoint
from vllm_hidden_transfer.checkpoint.vocabulary import load_vocabulary, save_vocabulary
from vllm_hidden_transfer.drafting.lookup import SHARES
from vllm_hidden_transfer.drafting.vocabulary import DraftVocabulary
from vllm_hidden_transfer.evaluation.study import (
    draft_with_maps,
    judged_answers,
    maps_drafter,
    measured,
)
from vllm_hidden_transfer.evaluation.study_result import Length
from vllm_hidden_transfer.evaluation.walks import walk
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import PrefixPasses
from vllm_hidden_transfer.offline.target import FrozenTarget

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

PROMPTS, TOKENS, BUDGET = 12, 48, 16
TOLERANCE = 0.02


def test_acceptance_length_is_the_engines(
    demo_target: Path, tmp_path: Path, record_property: Any
) -> None:
    """12 prompts x 48 tokens, greedy, fp32, 16 nodes: within 2%, which drafts from all tokens are not."""
    prompts = chat_prompts(demo_target, PROMPTS)
    options: dict[str, Any] = {
        "max_model_len": 1024,
        "max_num_seqs": PROMPTS,
        "kv_cache_memory_bytes": 1 << 32,  # with less scratch the engine would cut trees
    }
    checkpoint = tmp_path / "maps"
    shutil.copytree(demo_target / "hidden_transfer", checkpoint)
    config, maps = load_checkpoint(checkpoint)
    # A quarter of the demo's list, so that it shows when one side ignores it.
    listed = load_vocabulary(checkpoint, config)
    assert listed is not None
    save_vocabulary(checkpoint, listed[:4096].copy())
    speculation = with_maps(demo_target, BUDGET)
    speculation["speculative_config"]["model"] = str(checkpoint)
    with engine(demo_target, **options, **speculation) as llm:
        # Answers end where the target ends them, by a stop token or by their length.
        texts = generate(llm, prompts, max_tokens=TOKENS, ignore_eos=False)
        counters = counters_of(llm)
    assert len(texts.outputs) == PROMPTS
    decoded = sum(len(output) - 1 for output in texts.outputs)
    # Every decode pass has a draft: vLLM counts them all.
    in_engine = decoded / counters.drafts

    target = FrozenTarget.load(demo_target, config.transfer_layer)
    examples = [
        Example(str(number), "chat", 0.0, list(prompt), output)
        for number, (prompt, output) in enumerate(zip(prompts, texts.outputs, strict=True))
    ]
    prefixes = PrefixPasses(target, PROMPTS)
    answers = judged_answers(examples, TOKENS)
    maps = maps.float()
    temperatures = list(config.calibration.temperatures)
    outputs = [answer.tokens for answer in answers]

    def judged(vocabulary: DraftVocabulary | None) -> Length:
        drafts = draft_with_maps(
            target, prefixes, maps, answers, Progress(disable=True), vocabulary
        )
        drafter = maps_drafter(target, prefixes, maps, drafts, temperatures, vocabulary, SHARES)
        return measured(walk(outputs, drafter, BUDGET), outputs)

    vocabulary = DraftVocabulary.of(checkpoint, config)
    assert vocabulary is not None
    found, of_all_tokens = judged(vocabulary), judged(None)
    lengths = {"eval": found.length, "engine": in_engine, "all tokens": of_all_tokens.length}
    record_property("acceptance_length", json.dumps(lengths))
    print(lengths, f"passes {found.passes} / {counters.drafts}")
    assert found.length == pytest.approx(in_engine, rel=TOLERANCE)
    assert of_all_tokens.length != pytest.approx(in_engine, rel=TOLERANCE)
