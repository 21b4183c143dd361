# SPDX-License-Identifier: Apache-2.0
"""Draft distributions at every root of recorded answers: what accuracy and calibration are read off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.polynomial.chebyshev import chebpts1, chebvander
from numpy.typing import NDArray
from torch import Tensor

from vllm_hidden_transfer.checkpoint.maps import TransferMaps
from vllm_hidden_transfer.drafting.vocabulary import DraftVocabulary
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import Prefixes
from vllm_hidden_transfer.offline.target import FrozenTarget, SharedPrefixes

FloatArray = NDArray[np.float64]

WIDTH = 64
"""Candidates kept at each depth: as many as the largest tree of the study has nodes."""
TEXT_CONTEXT = 128
"""Tokens of a text without a prompt that are given, not judged; of a short text, its first half."""
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.4, 3.0
"""The softmax temperatures that kept drafts can be read at."""
_ROOTS_AT_ONCE = 128
_CURVE_POINTS = 8
_INVERSES = (1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE)
_NODES = chebpts1(_CURVE_POINTS)
_TO_SERIES = np.linalg.inv(chebvander(_NODES, _CURVE_POINTS - 1)).T
_NOTHING = -1e4  # log of a sum without terms, finite so that it can be interpolated


@dataclass(frozen=True)
class JudgedAnswer:
    """The part of an example that is judged: its first output tokens."""

    example: Example
    first: int
    """Position of the first output token."""
    tokens: tuple[int, ...]
    """The output tokens. The first one comes with the prompt's pass, the others from decode passes."""

    @classmethod
    def of(cls, example: Example, max_tokens: int) -> JudgedAnswer:
        """The answer as a request for at most `max_tokens` tokens would have got it."""
        first = len(example.prompt)
        if first < 2:
            # Text has no prompt: its beginning stands in for one. At position 0 targets park their
            # attention, and no map is trained there.
            first = min(TEXT_CONTEXT, max(len(example.tokens) // 2, 2))
        return cls(example, first, tuple(example.tokens[first : first + max_tokens]))

    def root(self, known: int) -> int:
        """Position of the root when the first `known` (at least 1) output tokens are known.

        The last known token has been sampled but not processed; the root is the token before it.
        """
        return self.first + known - 2

    @property
    def roots(self) -> range:
        """Every root that a decode pass can start from."""
        return range(self.root(1), self.root(len(self.tokens)))


@dataclass(frozen=True)
class Drafts:
    """Draft distributions at every root of one answer; n roots, k depths, `WIDTH` candidates.

    Depth i of a one-pass drafter is what it says of that position from the root alone; of a chained
    one, or one with a bigram re-weighting, what it says when the i - 1 tokens that came were drafted
    before it.
    """

    answer: JudgedAnswer
    tokens: NDArray[np.int32]
    """[n, k, width]: most probable first."""
    logits: NDArray[np.float32]
    """[n, k, width]: their logits."""
    rest: NDArray[np.float32]
    """[n, k, points]: log of the sum of exp(logit / temperature) over the tokens that are no candidates, as a
    Chebyshev series in 1 / temperature. Of so many small terms that is a smooth curve."""
    came: NDArray[np.int64]
    """[n, k]: the token that came; -1 beyond the end of the example."""
    came_logits: NDArray[np.float32]
    """[n, k]: its logit; NaN beyond the end and where the draft vocabulary lacks the token."""

    def log_totals(self, depth: int, temperature: float) -> FloatArray:
        """[n]: log of the sum of exp(logit / temperature) over the vocabulary, depth 0 first.

        Raises:
            ValueError: the temperature is out of range.
        """
        rest = self.rest[:, depth] @ _series_basis(temperature)
        kept = self.logits[:, depth].astype(np.float64) / temperature
        total: FloatArray = np.logaddexp(np.logaddexp.reduce(kept, axis=-1), rest)
        return total

    def log_probabilities(self, temperatures: Sequence[float]) -> FloatArray:
        """log softmax(logits / temperature of the depth) of the candidates [n, k, width]."""
        totals = [self.log_totals(depth, value) for depth, value in enumerate(temperatures)]
        return self.logits / np.array(temperatures)[:, None] - np.stack(totals, axis=1)[:, :, None]

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """[n, k]: rank of the token that came, 0 for the most probable; the width where it is none of the
        candidates, -1 beyond the end."""
        found = (self.tokens == self.came[:, :, None]) & np.isfinite(self.logits)
        ranks = np.where(found.any(-1), found.argmax(-1), self.tokens.shape[-1])
        return np.where(self.came >= 0, ranks, -1)


def _series_basis(temperature: float) -> FloatArray:
    """[points]: a series of `Drafts.rest` times this is its value at one temperature."""
    low, high = _INVERSES
    if not low * (1 - 1e-9) <= 1 / temperature <= high * (1 + 1e-9):
        raise ValueError(
            f"a calibration temperature of {temperature:g} cannot be judged: it must lie between "
            f"{LOWEST_TEMPERATURE:g} and {HIGHEST_TEMPERATURE:g}"
        )
    place = (2 / temperature - low - high) / (high - low)
    return np.asarray(chebvander(place, _CURVE_POINTS - 1), dtype=np.float64).ravel()


def _log_sum_series(logits: Tensor) -> Tensor:
    """Series [n, points] of log sum exp(logit / temperature) of logits [n, vocabulary]."""
    low, high = _INVERSES
    inverses = ((high - low) * _NODES + low + high) / 2
    sums = [(logits * float(inverse)).logsumexp(-1) for inverse in inverses]
    values = torch.stack(sums, dim=-1).double().clamp_min(_NOTHING)
    return values @ torch.from_numpy(_TO_SERIES).to(values.device)


def drafts_from_states(
    answer: JudgedAnswer,
    states: Iterator[Tensor] | Sequence[Tensor],
    head: Tensor,
    vocabulary: DraftVocabulary | None = None,
) -> Drafts:
    """Read the distributions off the states that a drafter hands to the LM head.

    Args:
        answer: the judged answer.
        states: [some roots, k, d], one after the other for all roots of the answer, after the last norm.
        head: the LM head's weight [vocabulary, d].
        vocabulary: what is drafted from; None for all tokens.
    """
    example = answer.example
    tokens = torch.tensor(example.tokens)
    kept: list[tuple[Tensor, ...]] = []
    start = answer.roots.start
    for part in states:
        steps = torch.arange(2, part.shape[1] + 2)
        places = torch.arange(start, start + len(part))[:, None] + steps
        came = tokens[places.clamp(max=len(tokens) - 1)]
        left_out = None
        if vocabulary is not None:
            known = [
                np.array(example.tokens[: root + 2], dtype=np.int32)
                for root in range(start, start + len(part))
            ]
            left_out = _left_out(vocabulary, known, len(head)).to(part.device)
        by_depth = [
            _keep(part[:, depth] @ head.T, came[:, depth].to(part.device), left_out)
            for depth in range(part.shape[1])
        ]
        top, logits, rest, logit = (
            torch.stack(part, dim=1) for part in zip(*by_depth, strict=True)
        )
        beyond = places >= len(tokens)
        kept.append(
            (
                top.int(),
                logits,
                rest.float(),
                came.masked_fill(beyond, -1),
                logit.masked_fill(beyond, float("nan")),
            )
        )
        start += len(part)
    return Drafts(answer, *(torch.cat(parts).numpy() for parts in zip(*kept, strict=True)))


def _left_out(vocabulary: DraftVocabulary, known: Sequence[NDArray[np.int32]], size: int) -> Tensor:
    """bool [n, size]: the tokens that are not drafted after the n known texts."""
    left_out = torch.ones(len(known), size, dtype=torch.bool)
    for row, tokens in zip(left_out, known, strict=True):
        row[torch.from_numpy(vocabulary.columns([tokens])[0])] = False
    return left_out


def _keep(logits: Tensor, came: Tensor, left_out: Tensor | None) -> tuple[Tensor, ...]:
    """Candidates, their logits, the series of the rest and the logit of the token that came, on the CPU."""
    logits = logits.float()
    if left_out is not None:
        logits = logits.masked_fill(left_out, -torch.inf)
    came_logits = logits.gather(1, came[:, None])[:, 0]
    came_logits = came_logits.masked_fill(came_logits == -torch.inf, float("nan"))
    top, ids = logits.topk(min(WIDTH, logits.shape[-1]), dim=-1)
    rest = _log_sum_series(logits.scatter(1, ids, float("-inf")))
    return tuple(part.cpu() for part in (ids, top, rest, came_logits))


@torch.no_grad()
def draft(
    target: FrozenTarget,
    prefixes: Prefixes,
    maps: TransferMaps,
    answer: JudgedAnswer,
    on_path: bool = True,
    vocabulary: DraftVocabulary | None = None,
) -> Drafts:
    """What transfer maps, which go where the target is, draft at every root of an answer in `prefixes`.

    `on_path=False` leaves a bigram re-weighting out: what a depth says from the root alone. A `vocabulary` makes them
    draft as an engine does that serves this answer alone or among a few.
    """
    maps = maps.to(target.device)
    states = _map_states(target, prefixes, maps, answer, on_path)
    return drafts_from_states(answer, states, target.head_weight, vocabulary)


def _map_states(
    target: FrozenTarget,
    prefixes: Prefixes,
    maps: TransferMaps,
    answer: JudgedAnswer,
    on_path: bool,
) -> Iterator[Tensor]:
    example, device = answer.example, target.device
    tokens = torch.tensor(example.tokens)
    hidden = prefixes.read("hidden", example)
    shared = on_device(prefixes.prefixes([example]), device)
    for start in range(answer.roots.start, answer.roots.stop, _ROOTS_AT_ONCE):
        roots = torch.arange(start, min(start + _ROOTS_AT_ONCE, answer.roots.stop))
        seen = roots + 1
        if maps.conditioning == "chained":
            seen = (seen[:, None] + torch.arange(maps.num_steps)).clamp(max=len(tokens) - 1)
        embedding = target.embed(tokens[seen]).float()
        pseudo = maps(hidden[roots].to(device), embedding)
        states = target.run_rows(pseudo[None], roots[None].to(device), shared)[0]
        if on_path and maps.bigram is not None:
            came = (roots[:, None] + torch.arange(2, maps.num_steps + 1)).clamp(max=len(tokens) - 1)
            states[:, 1:] += maps.bigram(target.embed(tokens[came]).float()).to(states.dtype)
        yield states


def on_device(prefixes: SharedPrefixes, device: torch.device) -> SharedPrefixes:
    """The same prefixes where the target is."""
    return SharedPrefixes(prefixes.keys.to(device), prefixes.values.to(device))
