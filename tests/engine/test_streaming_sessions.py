# SPDX-License-Identifier: Apache-2.0
"""Prompts that arrive in pieces (``StreamingInput``): every answer of a session is as without speculation.

An answer's end often falls inside an accepted path here, because the planted drafts know what the target would say
behind it. The oracle is twofold: the same session without speculation, and the whole context asked as one prompt.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import planted_options, random_prompts
from tests.support.models import VOCABULARY
from tests.support.sessions import Answered, Session, async_engine, complete, hold_all
from vllm_hidden_transfer.evaluation import planted

pytestmark = pytest.mark.engine

BEYOND = 12
"""Tokens behind an answer's end that the drafts know."""
OPTIONS: dict[str, Any] = {"enable_prefix_caching": True, "max_num_batched_tokens": 64}


def of_pieces(name: str, seed: int, sampling: dict[str, Any], *, waits: bool) -> Session:
    """Three pieces of random tokens; the first is cut into chunks, the answers cross blocks of 32."""
    return Session(
        name, random_prompts(3, seed=seed, lengths=(75, 9, 40)), [sampling] * 3, waits=waits
    )


def by_length(sampling: dict[str, Any] | None = None) -> list[Session]:
    return [
        of_pieces(
            f"{tokens}-{waits}",
            seed=tokens + 10 * waits,
            sampling={**(sampling or {}), "max_tokens": tokens},
            waits=waits,
        )
        for tokens in (3, 4, 5, 7)
        for waits in (True, False)
    ]


def by_stop_id() -> list[Session]:
    """A quarter of the vocabulary ends an answer, so that ends come after a few tokens and anywhere in a path."""
    return [
        of_pieces(
            f"stop-{first}",
            seed=30 + first,
            sampling={"max_tokens": 40, "stop_token_ids": [*range(first, VOCABULARY, 4)]},
            waits=bool(first % 2),
        )
        for first in range(4)
    ]


async def plant(llm: Any, held: list[Answered], path: Path) -> None:
    """Let drafts know the answers and what would follow; ask each context whole to see that a session says the same."""
    contexts = [context for answered in held for context in answered.contexts]
    answers = [answer for answered in held for answer in answered.answers]
    longest = max(map(len, answers)) + BEYOND
    whole = await complete(llm, contexts, "whole", max_tokens=longest)
    assert [text[: len(answer)] for text, answer in zip(whole, answers, strict=True)] == answers
    sequences = [[*context, *text] for context, text in zip(contexts, whole, strict=True)]
    planted.write_answers(path, sequences, VOCABULARY)


async def both(target: Path, path: Path) -> None:
    sessions = [*by_length(), *by_stop_id()]
    async with async_engine(target, **OPTIONS) as llm:
        held = await hold_all(llm, sessions)
        await plant(llm, held, path)
    reasons = [reason for answered in held for reason, _ in answered.reasons]
    assert set(reasons) == {"length", "stop"}
    async with async_engine(target, **OPTIONS, **planted_options(16)) as llm:
        assert await hold_all(llm, sessions) == held
        # What sessions left in the prefix cache is what it says it is.
        contexts = [context for answered in held for context in answered.contexts]
        answers = [answer for answered in held for answer in answered.answers]
        again = await complete(llm, contexts, "again", max_tokens=max(map(len, answers)))
    for text, answer in zip(again, answers, strict=True):
        assert text[: len(answer)] == answer


def test_every_answer_is_as_without(random_target: Path, tmp_path: Path) -> None:
    planted.write_answers(tmp_path / "answers.json", [], VOCABULARY)
    asyncio.run(both(random_target, tmp_path / "answers.json"))
