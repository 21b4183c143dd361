# SPDX-License-Identifier: Apache-2.0
"""Everything that a user sees of an answer, in a form that can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Logprobs = list[dict[int, tuple[float, int | None]]]


@dataclass(frozen=True)
class Answer:
    """One completion."""

    prompt: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: Logprobs | None = None
    """Of each token: id -> (log-probability, rank)."""
    prompt_logprobs: Logprobs | None = None

    @property
    def sequence(self) -> list[int]:
        return [*self.prompt, *self.token_ids]


def _logprobs(entries: Iterable[Mapping[int, Any] | None] | None) -> Logprobs | None:
    if entries is None:
        return None
    return [
        {token: (value.logprob, value.rank) for token, value in (entry or {}).items()}
        for entry in entries
    ]


def answers_of(output: Any) -> list[Answer]:
    """The completions of a vLLM ``RequestOutput``."""
    return [
        Answer(
            list(output.prompt_token_ids or ()),
            list(completion.token_ids),
            completion.text,
            completion.finish_reason,
            completion.stop_reason,
            _logprobs(completion.logprobs),
            _logprobs(output.prompt_logprobs),
        )
        for completion in output.outputs
    ]


def ask(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[Mapping[str, Any]],
    lora: Sequence[Any] | None = None,
) -> list[Answer]:
    """Answer the prompts together; the completions in their order."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        [SamplingParams(**each) for each in sampling],
        use_tqdm=False,
        lora_request=lora,
    )
    return [answer for output in outputs for answer in answers_of(output)]


TOLERANCE = 1e-4
"""Of log-probabilities in fp32: the last bits of a logit depend on how many rows a matrix product has."""


def assert_same(reference: Sequence[Answer], answers: Sequence[Answer]) -> None:
    """Same ids, text and reasons; log-probabilities within TOLERANCE, ranks equal."""
    assert len(reference) == len(answers)
    for one, other in zip(reference, answers, strict=True):
        assert other.token_ids == one.token_ids
        assert _without_logprobs(other) == _without_logprobs(one)
        assert_same_logprobs(one.logprobs, other.logprobs)
        assert_same_logprobs(one.prompt_logprobs, other.prompt_logprobs)


def _without_logprobs(answer: Answer) -> Answer:
    return replace(answer, logprobs=None, prompt_logprobs=None)


def assert_same_logprobs(one: Logprobs | None, other: Logprobs | None) -> None:
    if one is None or other is None:
        assert one is other
        return
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for token, (value, rank) in left.items():
            assert rank == right[token][1]
            np.testing.assert_allclose(right[token][0], value, rtol=0, atol=TOLERANCE)
