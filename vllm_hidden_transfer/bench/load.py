# SPDX-License-Identifier: Apache-2.0
"""The same load on several engines that take turns, so that a machine whose speed drifts treats all alike.

Each engine answers the same requests in the same order, so many at a time. The one that has given the fewest tokens
goes next, for a fraction of a second, so at any time all are at about the same place of the same work. What is compared
is the time on each engine's own clock, which stands still while the others compute: from token to token of a window, no
matter how many requests are under way at its ends. A batch answered to its end would measure its slowest request alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from vllm_hidden_transfer.bench.engine_process import EngineProcess, Generation, Turn

TURN_SECONDS = 0.4
"""Of computing, then another engine goes on: short beside the drift of a machine, long beside waking up."""


@dataclass
class Progress:
    """How far one engine has come."""

    clock: float = 0.0
    began: dict[int, float] = field(default_factory=dict)
    """When each request was handed in."""
    answers: dict[int, Generation] = field(default_factory=dict)
    """By request; `step_seconds` are since it was handed in."""
    tokens: int = 0
    over: bool = False
    clocks: list[float] = field(default_factory=lambda: [0.0])
    counts: list[int] = field(default_factory=lambda: [0])
    """Tokens until each of `clocks`."""

    def add(self, turn: Turn) -> None:
        """What one turn brought."""
        self.clock, self.over = turn.clock, turn.over
        for clock, index in turn.began:
            self.began[index] = clock
            self.answers[index] = Generation(prompt_ids=[])
        for output in turn.outputs:
            answer = self.answers[output.index]
            answer.finish_reason = output.finish_reason
            if not output.token_ids:
                continue
            answer.token_ids += output.token_ids
            answer.step_seconds.append(output.clock - self.began[output.index])
            answer.step_tokens.append(len(output.token_ids))
            self.tokens += len(output.token_ids)
            self.clocks.append(output.clock)
            self.counts.append(self.tokens)

    def seconds_of(self, window: int, tokens: int) -> float:
        """What the n-th so many tokens took, the first being number 0."""
        ends = np.interp([window * tokens, (window + 1) * tokens], self.counts, self.clocks)
        return float(ends[1] - ends[0])

    @property
    def ended(self) -> dict[int, Generation]:
        """The answers that are complete."""
        return {index: one for index, one in self.answers.items() if one.finish_reason is not None}


@dataclass(frozen=True)
class Figures:
    """What a user of one engine saw under one load, beside its speed."""

    first_token_ms: float
    """Median time to the first token."""
    each_token_ms: float
    """Median over answers of the time of a token after the first."""
    acceptance_length: float
    """Tokens a decode pass of one request."""


def figures(progress: Progress) -> Figures:
    """Of the requests that got at least two tokens."""
    counted = [one for one in progress.answers.values() if one.decoded]
    if not counted:
        return Figures(math.nan, math.nan, math.nan)
    return Figures(
        1e3 * float(np.median([one.step_seconds[0] for one in counted])),
        1e3 * float(np.median([one.decode_seconds / one.decoded for one in counted])),
        sum(one.decoded for one in counted) / max(sum(one.passes for one in counted), 1),
    )


def run(
    engines: Mapping[str, EngineProcess],
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[Mapping[str, Any]],
    at_a_time: int,
    tokens: int,
) -> Iterator[dict[str, Progress]]:
    """Answer on all engines in turns; what they have done whenever all of them have given so many tokens more.

    Endless, unless the prompts end; the load is stopped where nobody asks for more.
    """
    for engine in engines.values():
        engine.load(prompts, sampling, at_a_time)
    done = {name: Progress() for name in engines}
    try:
        goal = tokens
        while not any(one.over for one in done.values()):
            while (behind := min(done, key=lambda name: done[name].tokens)) and (
                done[behind].tokens < goal and not done[behind].over
            ):
                done[behind].add(engines[behind].turn(TURN_SECONDS))
            if done[behind].tokens < goal:
                return
            yield done
            goal += tokens
    finally:
        for engine in engines.values():
            engine.stop()


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean and the ends of its 95% interval (Student's t on logarithms); nan where one alone says nothing."""
    logs = np.log(ratios)
    middle = float(logs.mean())
    if len(logs) < 2:
        return math.exp(middle), math.nan, math.nan
    spread = float(stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs))
    return math.exp(middle), math.exp(middle - spread), math.exp(middle + spread)
