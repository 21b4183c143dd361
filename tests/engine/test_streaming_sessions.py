# SPDX-License-Identifier: Apache-2.0
"""Prompts that arrive in pieces (``StreamingInput``): every answer of a session is as without speculation.

An answer's end often falls inside an accepted path here, because the planted drafts know what the target would say
behind it. The oracle is twofold: the same session without speculation, and the whole context asked as one prompt.
tests/unit/test_streaming_sessions.py asks the scheduler alone.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.doubles import planted
from tests.support.engines import planted_options, random_prompts
from tests.support.models import VOCABULARY
from tests.support.sessions import Answered, Session, async_engine, complete, hold_all

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


def seeded() -> list[Session]:
    """Draws of one answer go on where those of the answer before ended."""
    return [
        of_pieces(
            f"seeded-{tokens}",
            seed=50 + tokens,
            sampling={"max_tokens": tokens, "temperature": 0.8, "seed": tokens},
            waits=tokens % 2 == 0,
        )
        for tokens in (4, 5)
    ]


async def plant(llm: Any, greedy: list[Answered], draws: list[Answered], path: Path) -> None:
    """Let drafts know the answers and what would follow; ask each context whole to see that a session says the same."""
    contexts = [context for answered in greedy for context in answered.contexts]
    answers = [answer for answered in greedy for answer in answered.answers]
    longest = max(map(len, answers)) + BEYOND
    whole = await complete(llm, contexts, "whole", max_tokens=longest)
    assert [text[: len(answer)] for text, answer in zip(whole, answers, strict=True)] == answers
    for answered in draws:
        first = answered.contexts[0]
        how = {"temperature": 0.8, "seed": len(answered.answers[0]), "max_tokens": longest}
        contexts.append(first)
        whole.extend(await complete(llm, [first], f"seeded {len(whole)}", **how))
        assert whole[-1][: len(answered.answers[0])] == answered.answers[0]
    sequences = [[*context, *text] for context, text in zip(contexts, whole, strict=True)]
    planted.write_answers(path, sequences, VOCABULARY)


async def both(target: Path, path: Path) -> None:
    greedy, draws = [*by_length(), *by_stop_id()], seeded()
    # Stock dies of a seeded prompt in chunks (test_stock_bugs.py).
    async with async_engine(target, **OPTIONS | {"max_num_batched_tokens": 2048}) as llm:
        held = await hold_all(llm, [*greedy, *draws])
        greedy_held, draws_held = held[: len(greedy)], held[len(greedy) :]
        await plant(llm, greedy_held, draws_held, path)
    assert {reason for each in held for reason, _ in each.reasons} == {"length", "stop"}
    async with async_engine(target, **OPTIONS, **planted_options(16)) as llm:
        assert await hold_all(llm, greedy) == greedy_held
        assert await hold_all(llm, draws) == draws_held
        # What sessions left in the prefix cache is what it says it is.
        contexts = [context for answered in greedy_held for context in answered.contexts]
        answers = [answer for answered in greedy_held for answer in answered.answers]
        again = await complete(llm, contexts, "again", max_tokens=max(map(len, answers)))
    for text, answer in zip(again, answers, strict=True):
        assert text[: len(answer)] == answer


def test_every_answer_is_as_without(random_target: Path, tmp_path: Path) -> None:
    """Greedy by length and by stop id, seeded; pieces that wait for the answer before and pieces that come at once.

    A request goes on after its end in no other way. Only a resumable request does (``_handle_stopped_request``), and
    only ``AsyncLLM`` makes one. ``n > 1`` and beam search ask new requests, which meet the prefix cache alone: blocks
    are cached when a pass is planned, up to the tokens that were accepted before it, so never behind an end
    (asked above, after the sessions). A paused request (``/pause?mode=keep``) and one that is preempted have not
    ended; an aborted one is dropped. A stop string is found by the front end, which then aborts.
    """
    planted.write_answers(tmp_path / "answers.json", [], VOCABULARY)
    asyncio.run(both(random_target, tmp_path / "answers.json"))
