# SPDX-License-Identifier: Apache-2.0
"""Prompts in pieces: sessions of ``AsyncLLM.generate`` over a stream of ``StreamingInput``."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support.engines import SMALL

SLOW = 0.05
"""Seconds that the client of a session that does not wait takes for an output, as on a loaded machine."""


@asynccontextmanager
async def async_engine(model: Path, **options: Any) -> AsyncIterator[Any]:
    """An ``AsyncLLM`` (its core in a process of its own), closed on the way out."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine import async_llm

    arguments = AsyncEngineArgs(**{"model": str(model), **SMALL, **options})
    llm = async_llm.AsyncLLM.from_engine_args(arguments)
    try:
        with patch.object(async_llm, "RequestOutputCollector", _one_by_one()):
            yield llm
    finally:
        llm.shutdown()


def _one_by_one() -> type:
    """A collector that hands out every output alone.

    Stock's own merges the outputs that a slow consumer has not taken, also across the end of a session's answer:
    on a slow machine two answers then arrive as one.
    """
    from vllm.v1.engine.output_processor import RequestOutputCollector

    class OneByOne(RequestOutputCollector):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._waiting: deque[Any] = deque()

        def put(self, output: Any) -> None:
            if self.output is None:
                super().put(output)
            else:
                self._waiting.append(output)

        def _next(self) -> None:
            if self._waiting:
                super().put(self._waiting.popleft())

        async def get(self) -> Any:
            output = await super().get()
            self._next()
            return output

        def get_nowait(self) -> Any:
            output = super().get_nowait()
            self._next()
            return output

    return OneByOne


@dataclass(frozen=True)
class Session:
    """Pieces of a prompt, each with how it is to be answered."""

    name: str
    pieces: Sequence[Sequence[int]]
    sampling: Sequence[dict[str, Any]]
    """Of each piece."""
    waits: bool = True
    """Whether a piece is sent when the one before was answered, or all of them at once."""


@dataclass
class Answered:
    """What a session gave."""

    contexts: list[list[int]] = field(default_factory=list)
    """What the target has to answer at each piece: the pieces so far and the answers that vLLM keeps of them."""
    answers: list[list[int]] = field(default_factory=list)
    reasons: list[tuple[str | None, int | str | None]] = field(default_factory=list)
    """Finish and stop reason of each answer."""


def _params(sampling: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        **{"temperature": 0.0, "ignore_eos": True, "detokenize": False, **sampling},
        output_kind=RequestOutputKind.DELTA,
    )


async def hold(llm: Any, session: Session) -> Answered:
    """Hold a session with the engine."""
    from vllm.engine.protocol import StreamingInput
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    answered = asyncio.Semaphore(1)

    async def pieces() -> AsyncIterator[Any]:
        for piece, sampling in zip(session.pieces, session.sampling, strict=True):
            if session.waits:
                await answered.acquire()
            parsed = parse_model_prompt(llm.model_config, {"prompt_token_ids": list(piece)})
            (prompt,) = await llm.renderer.render_cmpl_async([parsed])
            yield StreamingInput(prompt=prompt, sampling_params=_params(sampling))

    result = Answered()
    tokens: list[int] = []
    async for output in llm.generate(pieces(), _params(session.sampling[0]), session.name):
        if not session.waits:
            await asyncio.sleep(SLOW)
        (completion,) = output.outputs
        tokens.extend(completion.token_ids)
        if completion.finish_reason is not None:
            _close(result, session, tokens, completion)
            tokens = []
            answered.release()
    assert not tokens
    return result


def _close(result: Answered, session: Session, tokens: list[int], completion: Any) -> None:
    """vLLM keeps an answer but for its last token, whose keys and values it never computed."""
    kept = [*result.contexts[-1], *result.answers[-1][:-1]] if result.answers else []
    result.contexts.append([*kept, *session.pieces[len(result.answers)]])
    result.answers.append(tokens)
    result.reasons.append((completion.finish_reason, completion.stop_reason))


async def hold_all(llm: Any, sessions: Sequence[Session]) -> list[Answered]:
    """Hold all sessions at the same time."""
    return list(await asyncio.gather(*(hold(llm, session) for session in sessions)))


async def complete(
    llm: Any, prompts: Sequence[Sequence[int]], name: str, **sampling: Any
) -> list[list[int]]:
    """Answer whole prompts, all at the same time."""

    async def one(index: int, prompt: Sequence[int]) -> list[int]:
        tokens: list[int] = []
        request = {"prompt_token_ids": list(prompt)}
        async for output in llm.generate(request, _params(sampling), f"{name}-{index}"):
            tokens.extend(output.outputs[0].token_ids)
        return tokens

    return list(await asyncio.gather(*(one(*each) for each in enumerate(prompts))))
