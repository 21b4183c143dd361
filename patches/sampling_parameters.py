# SPDX-License-Identifier: Apache-2.0
"""``min_p`` and ``logit_bias`` under tree verification."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm_hidden_transfer.asking import is_ours
from vllm_hidden_transfer.names import STAND_IN
from vllm_hidden_transfer.patches.base import Patch, Surface

SURFACES_IN_WORKERS = (
    Surface(
        "vllm.v1.worker.gpu_model_runner",
        "build_logitsprocs",
        ("vllm_config", "device", "is_pin_memory", "is_pooling_model"),
    ),
    Surface("vllm.v1.sample.logits_processor", "BUILTIN_LOGITS_PROCESSORS"),
)
"""What ``built_in_processors`` builds on, apart because the runner is too heavy to import at every start."""


def _install() -> None:
    from vllm.sampling_params import SamplingParams

    stock = SamplingParams._validate_spec_decode

    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if not is_ours(speculative_config):
            stock(self, speculative_config)
        elif speculative_config.method == STAND_IN:
            refuse_under_v2(self)

    SamplingParams._validate_spec_decode = _validate_spec_decode


def refuse_under_v2(params: Any) -> None:
    """Refuse what V2's own code takes for a chain and ours does not do on a tree yet.

    Raises:
        VLLMValidationError: one sentence, which fails the request and not the engine.
    """
    from vllm.exceptions import VLLMValidationError

    asked = {
        "structured outputs": params.structured_outputs is not None,
        "bad_words": bool(params.bad_words),
        "logprob_token_ids": bool(params.logprob_token_ids),
        "thinking_token_budget": params.thinking_token_budget is not None,
    }
    for what, applies in asked.items():
        if applies:
            raise VLLMValidationError(
                f"hidden_transfer does not serve {what} under vLLM's V2 model runner: leave them out of the request, "
                "or start the server with VLLM_USE_V2_MODEL_RUNNER=0."
            )


@contextmanager
def built_in_processors() -> Iterator[None]:
    """While this lasts, a runner that is made gets the logits processors of no speculation."""
    from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
    from vllm.v1.worker import gpu_model_runner

    stock = gpu_model_runner.build_logitsprocs

    def build_logitsprocs(
        vllm_config: Any,
        device: Any,
        is_pin_memory: bool,
        is_pooling_model: bool,
        custom_logitsprocs: Sequence[Any] = (),
    ) -> Any:
        # Stock refuses the first and needs no processors for the other.
        if custom_logitsprocs or is_pooling_model:
            return stock(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
        return LogitsProcessors(
            kind(vllm_config, device, is_pin_memory) for kind in BUILTIN_LOGITS_PROCESSORS
        )

    gpu_model_runner.build_logitsprocs = build_logitsprocs
    try:
        yield
    finally:
        gpu_model_runner.build_logitsprocs = stock


PATCH = Patch(
    name="sampling_parameters",
    why="vLLM refuses min_p and logit_bias with any speculation, because its rejection sampler knows no logits "
    "processors by row. Our walk samples every row with the stock sampler and the request's own processors.",
    how="Wraps SamplingParams._validate_spec_decode (stock's for every other method; under V2 ours refuses what its "
    "kernels take for a chain) and lets our V1 runner build the built-in logits processors.",
    versions="0.32",
    retired_by="a check by speculative method in vLLM",
    surfaces=(
        Surface(
            "vllm.sampling_params", "SamplingParams._validate_spec_decode", ("speculative_config",)
        ),
    ),
    install=_install,
)
