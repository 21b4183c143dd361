# SPDX-License-Identifier: Apache-2.0
"""The judge of greedy identity: are two texts the same, up to the target's own numerics?

A matrix product of 1, of 4 and of 17 rows takes other kernels, which add in another order. So the logits of one and
the same prefix depend on how many rows were computed with it, and where the two best tokens nearly tie, greedy texts
part without any error: stock vLLM's own texts do, batched and one by one. Speculation changes the number of rows of
every step. The judge tells such a parting from a wrong token.

**What it measures.** At the first token where two texts part it asks the target (`Reference`) for the logits after
that prefix several times: with the end of the answer so far computed in passes of 1, 2, 4, 8, 17 and 33 rows, in the
dtype under test, and in low precision once more in fp32 with the same weights. It looks at the 32 best tokens and the
two that parted. *Spread* is the most by which the difference of any two of these logits moves between any two of the
computations, and at least one unit in the last place of the best logit, because low-precision logits are themselves
rounded. Differences are what decides, so that a shift of all logits does not count.

**The rule.** The logits are averaged over the computations. In low precision a parting is *rounding* where both tokens
lie within the spread of the best one, *wrong* otherwise. A token that is the best of any one of the computations, or
within the spread of it there, is at most that much behind on average, so every honest parting that the reference
shows passes. In fp32 the bound is not measured but fixed: 1e-5 of the best logit, some ten times what fp32 rounding
does.

**Why the fp32 computation.** The engine under test has kernels of its own (AMX tiles, oneDNN, fused layers), so its
logits are none of the reference's. A spread between row counts alone would be too small wherever the reference's
kernels happen to agree with themselves, and would call honest texts wrong. The distance between low precision and
fp32 is the rounding error itself, of whichever kernels, so any computation in that dtype lies about so far from fp32.

**What it cannot see.** A wrong token whose logit ties with the best one within the spread. Errors rarely choose such
tokens, so they show elsewhere; and a text that parts by rounding more often than once in `TOKENS_PER_ROUNDING` tokens
is called wrong.

**Nothing hides behind a first difference.** After a *rounding* the side without speculation is asked again for the
rest, from the prefix that ends with the parted token, and the comparison goes on to the end of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

Tokens = Sequence[int]
Ask = Callable[[list[list[int]], list[int]], Sequence[Tokens]]
"""Continues prefixes without speculation, each by at most so many tokens."""

ROW_COUNTS = (1, 2, 4, 8, 17, 33)
"""Rows of a pass: alone, small batches, and a token with a tree of 16 and of 32 nodes."""
FP32_BOUND = 1e-5
"""How far behind the best logit a token may lie in fp32, as a share of it."""
WATCHED = 32
"""How many of the best tokens the spread is taken over."""
TAIL = 64
"""The answer's last tokens that are computed in passes of so many rows."""
TOKENS_PER_ROUNDING = 8
"""A text that parts by rounding more often than this is wrong."""


class Reference(Protocol):
    """The target, computed apart from any engine."""

    dtype: torch.dtype
    """The dtype under test."""

    def logits(self, prompt: Tokens, answer: Tokens) -> torch.Tensor:
        """Logits of the token after prompt + answer, computed several ways, [computations, vocabulary] in fp32."""
        ...


class Verdict(StrEnum):
    IDENTICAL = "identical"
    ROUNDING = "rounding"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """One place where two texts part."""

    prompt: int
    """Index of the prompt."""
    position: int
    """Index of the token in the answer."""
    expected: int | None
    """Token of the text without speculation; None where it has ended."""
    tested: int | None
    """Token of the tested text; None where it has ended."""
    gap: float
    """Distance of the two tokens' logits."""
    behind: float
    """How far the worse of the two lies behind the best logit."""
    spread: float
    """How far the difference of two logits moves between computations."""
    bound: float
    """What `behind` may be."""
    verdict: Verdict
    reason: str = ""

    def __str__(self) -> str:
        """One line with the gap and the spread."""
        where = f"prompt {self.prompt}, token {self.position}: {self.tested} for {self.expected}"
        numbers = f"gap {self.gap:.3g}, spread {self.spread:.3g}"
        if self.behind > self.gap:
            numbers += f", {self.behind:.3g} behind the best"
        if self.bound != self.spread:
            numbers += f", bound {self.bound:.3g}"
        return f"{where}: {numbers}: {self.verdict}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Judgement:
    """The verdict on each text, and every place where texts parted."""

    verdicts: tuple[Verdict, ...]
    findings: tuple[Finding, ...]

    def count(self, verdict: Verdict) -> int:
        return self.verdicts.count(verdict)

    @property
    def wrong(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if one.verdict is Verdict.WRONG)

    def __str__(self) -> str:
        """The three counts, then a line for each finding."""
        counts = ", ".join(f"{verdict}: {self.count(verdict)}" for verdict in Verdict)
        return "\n".join([f"{counts} of {len(self.verdicts)}", *map(str, self.findings)])


def weigh(logits: torch.Tensor, dtype: torch.dtype, expected: int, tested: int) -> dict[str, Any]:
    """Gap, behind, spread, bound and verdict of two tokens under these logits, [computations, vocabulary]."""
    logits = logits.double()
    mean = logits.mean(0)
    best = float(mean.max())
    two = mean[[expected, tested]]
    watched = torch.cat(
        [mean.topk(min(WATCHED, len(mean))).indices, torch.tensor([expected, tested])]
    )
    near = logits[:, watched]
    moved = near[:, None] - near[None]  # between every two computations
    spread = float((moved.amax(-1) - moved.amin(-1)).max())
    if dtype == torch.float32:
        bound = FP32_BOUND * abs(best)
    else:
        exponent = math.frexp(best)[1] - 1
        spread = max(spread, torch.finfo(dtype).eps * 2.0**exponent)
        bound = spread
    behind = best - float(two.min())
    return {
        "gap": abs(float(two[0] - two[1])),
        "behind": behind,
        "spread": spread,
        "bound": bound,
        # A NaN is never rounding.
        "verdict": Verdict.ROUNDING if behind <= bound else Verdict.WRONG,
    }


def parting(expected: Tokens, tested: Tokens) -> int | None:
    """The first position at which two texts differ, an early end included; None where they are the same."""
    for position, (left, right) in enumerate(zip(expected, tested, strict=False)):
        if left != right:
            return position
    return None if len(expected) == len(tested) else min(len(expected), len(tested))


@dataclass
class _Text:
    """A tested text on its way to a verdict."""

    number: int
    prompt: list[int]
    tested: list[int]
    limit: int
    done: int = 0
    """Tokens that need no more comparing."""
    roundings: int = 0


class _Judge:
    def __init__(self, reference: Reference, ends: Collection[int], count: int) -> None:
        self.reference, self.ends = reference, ends
        self.findings: list[Finding] = []
        self.verdicts = [Verdict.IDENTICAL] * count

    def compare(self, text: _Text, expected: Tokens) -> bool:
        """Compare what is left of a text with what was expected there; whether the rest has to be asked again."""
        place = parting(expected, text.tested[text.done :])
        if place is None:
            return False
        position = text.done + place
        finding = self._finding(text, position, expected[place] if place < len(expected) else None)
        self.findings.append(finding)
        self.verdicts[text.number] = finding.verdict
        text.done = position + 1
        text.roundings += 1
        if finding.verdict is Verdict.WRONG:
            return False
        ended = text.tested[position] in self.ends
        return not ended and text.done < text.limit

    def _finding(self, text: _Text, position: int, expected: int | None) -> Finding:
        tested = text.tested[position] if position < len(text.tested) else None
        place = (text.number, position, expected, tested)
        if expected is None or tested is None:
            reason = "cut short" if tested is None else "goes on after its end"
            unknown = math.nan
            return Finding(*place, unknown, unknown, unknown, unknown, Verdict.WRONG, reason)
        logits = self.reference.logits(text.prompt, text.tested[:position])
        weighed = weigh(logits, self.reference.dtype, expected, tested)
        reason = ""
        if weighed["verdict"] is Verdict.ROUNDING:
            reason = self._objection(text, position)
            weighed["verdict"] = Verdict.WRONG if reason else Verdict.ROUNDING
        return Finding(*place, **weighed, reason=reason)

    def _objection(self, text: _Text, position: int) -> str:
        """Why a parting by rounding is wrong all the same."""
        if text.tested[position] in self.ends and position + 1 < len(text.tested):
            return "goes on after its end"
        if text.roundings >= max(2, math.ceil(text.limit / TOKENS_PER_ROUNDING)):
            return "parts too often for rounding"
        return ""


def judge(
    prompts: Sequence[Tokens],
    expected: Sequence[Tokens],
    tested: Sequence[Tokens],
    reference: Reference,
    ask: Ask,
    *,
    limits: Sequence[int] | None = None,
    ends: Collection[int] = (),
) -> Judgement:
    """Judge greedy answers against those without speculation.

    prompts, expected, tested: token ids of each prompt, of its answer without speculation, and of the tested answer.
    reference: asked only where texts part.
    ask: continues prefixes without speculation, greedily, each to the given number of tokens or to an end token;
        called only after a *rounding*, with all such prefixes of a round together.
    limits: the most tokens an answer may have; by default the length of the expected one.
    ends: tokens that end an answer.

    Raises ValueError where the lists differ in length.
    """
    bounds = [len(answer) for answer in expected] if limits is None else list(limits)
    texts = [
        _Text(number, list(prompt), list(answer), limit)
        for number, (prompt, answer, limit) in enumerate(zip(prompts, tested, bounds, strict=True))
    ]
    judging = _Judge(reference, ends, len(texts))
    open_texts = [
        text for text, answer in zip(texts, expected, strict=True) if judging.compare(text, answer)
    ]
    while open_texts:  # each round adds a rounding to every open text, and a text may have few
        prefixes = [[*text.prompt, *text.tested[: text.done]] for text in open_texts]
        answers = ask(prefixes, [text.limit - text.done for text in open_texts])
        open_texts = [
            text
            for text, answer in zip(open_texts, answers, strict=True)
            if judging.compare(text, answer)
        ]
    return Judgement(tuple(judging.verdicts), tuple(judging.findings))


class TransformersReference:
    """A target under transformers, loaded when it is first asked.

    folder: the target's folder.
    dtype: the dtype under test, of torch or by name.
    device: where it runs.

    In low precision an fp32 copy of the same (rounded) weights is held too.
    """

    def __init__(self, folder: Path | str, dtype: torch.dtype | str, device: str = "cpu") -> None:
        self.folder, self.device = folder, device
        self.dtype: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype)
        return model.to(self.device).eval()

    @cached_property
    def _exact(self) -> Any:
        return deepcopy(self._model).float()

    @torch.inference_mode()
    def logits(self, prompt: Tokens, answer: Tokens) -> torch.Tensor:
        """See `Reference`: a row for each of ROW_COUNTS, and in low precision one in fp32.

        What comes before the answer's last TAIL tokens is computed in one pass for all of them.
        """
        tokens = torch.tensor([[*prompt, *answer]], device=self.device)
        tail = max(1, min(len(answer), TAIL))
        shared = max(0, tokens.shape[1] - max(_rounded_up(tail, rows) for rows in ROW_COUNTS))
        head, rest = tokens[:, :shared], tokens[:, shared:]
        cache = self._continue(self._model, self._new_cache(), [head] if shared else [])[1]
        seen = []
        for rows in ROW_COUNTS:
            lead = max(0, rest.shape[1] - _rounded_up(tail, rows))
            odd = (rest.shape[1] - lead) % rows  # where the text is too short to round up
            cuts = [lead, *range(lead + odd, rest.shape[1], rows)]
            pieces = [piece for piece in rest.tensor_split(cuts, dim=1) if piece.shape[1]]
            seen.append(self._continue(self._model, deepcopy(cache), pieces)[0])
        if self.dtype != torch.float32:
            seen.append(self._continue(self._exact, self._new_cache(), [tokens])[0])
        return torch.stack(seen)

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    @staticmethod
    def _continue(model: Any, cache: Any, passes: list[torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """Logits after the last of these passes, [vocabulary], and the cache that they filled."""
        logits = torch.empty(0)
        for piece in passes:
            logits = model(piece, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        return logits.float().cpu(), cache


def _rounded_up(size: int, rows: int) -> int:
    return math.ceil(size / rows) * rows
