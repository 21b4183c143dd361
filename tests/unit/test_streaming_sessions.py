# SPDX-License-Identifier: Apache-2.0
"""A session (prompts in pieces) goes on behind its answer's last token: vLLM's own scheduler, driven by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.doubles import planted
from tests.support.engines import planted_options

BLOCK = 32
PROMPT = list(range(100, 100 + BLOCK - 2))
PATH = [11, 12, 13, 14, 15]
"""What a step gives whose four drafts were all accepted."""
PIECE = [21, 22, 23]
STOCK = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}}


def scheduler(target: Path, **options: Any) -> Any:
    """vLLM's scheduler for such an engine, made as the engine core makes it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    args = EngineArgs(
        model=str(target), skip_tokenizer_init=True, dtype="float32", block_size=BLOCK, **options
    )
    config = args.create_engine_config()
    config.cache_config.num_gpu_blocks = 16
    cache = FullAttentionSpec(block_size=BLOCK, num_kv_heads=4, head_size=32, dtype=torch.float32)
    made = config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(16, [], [KVCacheGroupSpec(["layer"], cache)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
    )
    assert made.num_spec_tokens == 4
    return made


def piece(tokens: list[int], **sampling: Any) -> Any:
    """One piece of a session as a request."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    return Request(
        request_id="session",
        prompt_token_ids=list(tokens),
        sampling_params=SamplingParams(temperature=0.0, ignore_eos=True, **sampling),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
        resumable=True,
    )


def step(made: Any, sampled: list[int], drafts: list[int]) -> Any:
    """One step of the engine core: what it scheduled."""
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

    scheduled = made.schedule()
    made.update_from_output(
        scheduled, ModelRunnerOutput(["session"], {"session": 0}, [list(sampled)])
    )
    made.update_draft_token_ids(DraftTokenIds(["session"], [list(drafts)]))
    return scheduled


def answered(made: Any, **sampling: Any) -> Any:
    """The session after a prompt, one token, and a step whose path goes on behind the answer's end."""
    request = piece(PROMPT, **sampling)
    made.add_request(request)
    step(made, [10], PATH[:4])
    step(made, PATH, [31, 32])
    return request


@pytest.fixture(autouse=True)
def answers(tmp_path: Path) -> None:
    planted.write_answers(tmp_path / "answers.json", [], 2048)


@pytest.mark.parametrize("end", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("by", ["length", "stop id"])
@pytest.mark.parametrize("waits", [True, False])
def test_a_session_goes_on_behind_its_answer(
    end: int, by: str, waits: bool, random_target: Path
) -> None:
    """Whether the next piece waits already or comes later; 30 tokens of prompt, so that paths cross a block's end."""
    made = scheduler(random_target, **planted_options(4))
    how: dict[str, Any] = (
        {"max_tokens": 1 + end}
        if by == "length"
        else {"max_tokens": 50, "stop_token_ids": [PATH[end - 1]]}
    )
    if waits:
        request = answered(made, **how)
    else:
        request = piece(PROMPT, **how)
        made.add_request(request)
        made.add_request(piece(PIECE, max_tokens=4))
        step(made, [10], PATH[:4])
        step(made, PATH, [31, 32])
    kept = [*PROMPT, 10, *PATH[: end - 1]]
    assert request.num_computed_tokens == len(kept)
    if waits:
        made.add_request(piece(PIECE, max_tokens=4))
    scheduled = made.schedule()
    (new,) = scheduled.scheduled_new_reqs
    assert new.prompt_token_ids == [*kept, *PIECE]
    assert new.num_computed_tokens == len(kept)
    assert scheduled.num_scheduled_tokens == {"session": len(PIECE)}
    assert not scheduled.scheduled_spec_decode_tokens
    fresh = piece([*kept, *PIECE])
    assert request.block_hashes == fresh.block_hashes


def test_a_seeded_session_gets_no_drafts(random_target: Path) -> None:
    """A path behind the end would have drawn from the generator that the next answer goes on with."""
    made = scheduler(random_target, **planted_options(4))
    request = piece(PROMPT, max_tokens=9, seed=5)
    made.add_request(request)
    step(made, [10], PATH[:4])
    assert made.schedule().num_scheduled_tokens == {"session": 1}
    assert request.resumable


def test_stock_counts_a_path_behind_the_end(random_target: Path) -> None:
    """Retires patches/streaming_sessions.py but for seeded sessions; it also shows that other engines stay stock."""
    made = scheduler(random_target, **STOCK)
    request = answered(made, max_tokens=3)
    assert request.num_tokens == len(PROMPT) + 3
    assert request.num_computed_tokens == len(PROMPT) + 1 + 4
