# SPDX-License-Identifier: Apache-2.0
"""Which model runner serves hidden_transfer is vLLM's choice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.engines import SMALL, planted_options
from tests.support.under_v2 import under_v2

pytestmark = pytest.mark.engine

WORKER = "vllm_hidden_transfer.engine.cpu.HiddenTransferCPUWorker"
Choice = tuple[str, bool, bool, str]


def choices(target: Path) -> dict[str, Choice]:
    """Method, V2, async scheduling and worker where vLLM has Triton."""
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    def choice(value: str | None) -> Choice:
        os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
        if value is not None:
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = value
        config = EngineArgs(model=str(target), **SMALL, **planted_options(4)).create_engine_config()
        speculative = config.speculative_config
        assert speculative.model == "vllm_hidden_transfer.engine.v1.runner.UnusedProposer"
        return (
            speculative.method,
            config.use_v2_model_runner,
            config.scheduler_config.async_scheduling,
            config.parallel_config.worker_cls,
        )

    found = {str(value): choice(value) for value in ("1", "0", None)}
    VllmConfig._get_v2_model_runner_unsupported_features = lambda self: ["this target"]
    found["unset, and V2 cannot"] = choice(None)
    return found


def refusals() -> list[str]:
    """What requests are told that V2 cannot serve yet."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    from vllm_hidden_transfer.patches.sampling_parameters import refuse_under_v2

    refuse_under_v2(SamplingParams(min_p=0.1, logit_bias={3: 1.0}, presence_penalty=0.5))
    messages = []
    for params in (
        SamplingParams(bad_words=["no"]),
        SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a", "b"])),
        SamplingParams(logprob_token_ids=[3, 4], logprobs=2),
    ):
        try:
            refuse_under_v2(params)
        except VLLMValidationError as error:
            messages.append(str(error))
    return messages


def test_the_runner_is_vllms_choice(tiny_target: Path) -> None:
    found = under_v2(choices, tiny_target, async_scheduling=True)
    v1, v2 = ("custom_class", False, False, WORKER), ("ngram_gpu", True, True, WORKER)
    assert found == {"1": v2, "0": v1, "None": v2, "unset, and V2 cannot": v1}


def test_what_v2_cannot_serve_is_refused_in_one_sentence() -> None:
    messages = refusals()
    assert len(messages) == 3
    for message, what in zip(
        messages, ("bad_words", "structured outputs", "logprob_token_ids"), strict=True
    ):
        assert f"does not serve {what} under vLLM's V2 model runner" in message
        assert "VLLM_USE_V2_MODEL_RUNNER=0" in message
