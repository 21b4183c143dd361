# SPDX-License-Identifier: Apache-2.0
"""The acceptance study of one checkpoint on recorded answers: no engine, no noise."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress

from vllm_hidden_transfer.checkpoint.maps import WEIGHTS_FILE, BigramMaps, TransferMaps
from vllm_hidden_transfer.drafting.bigram import BigramTables
from vllm_hidden_transfer.drafting.vocabulary import DraftVocabulary
from vllm_hidden_transfer.evaluation.acceptance import acceptance, repeated_share
from vllm_hidden_transfer.evaluation.calibration import (
    calibration_error,
    negative_log_likelihood,
    reliability,
)
from vllm_hidden_transfer.evaluation.chained import ChainedDrafter
from vllm_hidden_transfer.evaluation.drafts import Drafts, FloatArray, JudgedAnswer, draft
from vllm_hidden_transfer.evaluation.study_result import (
    Budget,
    Depth,
    Group,
    Length,
    Provenance,
)
from vllm_hidden_transfer.evaluation.walks import (
    BigramDrafter,
    Drafter,
    OnePassDrafter,
    Walk,
    walk,
)
from vllm_hidden_transfer.machine import this_machine
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import Prefixes
from vllm_hidden_transfer.offline.target import FrozenTarget

BUDGETS = (1, 2, 4, 8, 16, 32, 64)
OPENING_TOKENS = 48


@dataclass(frozen=True)
class Judged:
    """What there is to judge: answers, their drafts, and who drafts their trees."""

    drafts: Sequence[Drafts]
    drafter: Drafter
    temperatures: Sequence[float]

    @property
    def answers(self) -> list[JudgedAnswer]:
        """The judged answers, in the drafter's order."""
        return [item.answer for item in self.drafts]

    @property
    def outputs(self) -> list[tuple[int, ...]]:
        """Their output tokens."""
        return [answer.tokens for answer in self.answers]


def judged_answers(examples: Sequence[Example], max_tokens: int) -> list[JudgedAnswer]:
    """The parts to judge; examples without a decode pass are left out."""
    answers = [JudgedAnswer.of(example, max_tokens) for example in examples]
    return [answer for answer in answers if len(answer.tokens) > 1]


def draft_with_maps(
    target: FrozenTarget,
    prefixes: Prefixes,
    maps: TransferMaps,
    answers: Sequence[JudgedAnswer],
    progress: Progress,
    vocabulary: DraftVocabulary | None = None,
) -> list[Drafts]:
    """Drafts at all roots of answers."""
    return [
        draft(target, prefixes, maps, answer, vocabulary=vocabulary)
        for answer in progress.track(answers, description="drafting")
    ]


def maps_drafter(
    target: FrozenTarget,
    prefixes: Prefixes,
    maps: TransferMaps,
    drafts: Sequence[Drafts],
    temperatures: Sequence[float],
    vocabulary: DraftVocabulary | None = None,
    shares: FloatArray | None = None,
) -> Drafter:
    """Trees of transfer maps: from the drafts themselves, which `vocabulary` is that of, or path by path where they are
    chained.

    With `shares` (``drafting/lookup.py``) prompt lookup is mixed in as the engine does it; never into chained maps.
    """
    if maps.conditioning == "chained":
        answers = [item.answer for item in drafts]
        return ChainedDrafter(target, prefixes, maps, answers, temperatures)
    if maps.bigram is not None:
        marginals = [
            draft(target, prefixes, maps, item.answer, on_path=False, vocabulary=vocabulary)
            for item in drafts
        ]
        tables = bigram_tables(target, maps.bigram)
        return BigramDrafter(marginals, tables, temperatures, shares)
    return OnePassDrafter(drafts, temperatures, shares)


def bigram_tables(target: FrozenTarget, maps: BigramMaps) -> BigramTables:
    """The tables of a bigram re-weighting, as the engine makes them."""
    return BigramTables.of(
        maps.to(target.device),
        target.vocab_size,
        target.embed,
        lambda ids: target.head_weight[ids],
    )


def judge(
    judged: Judged, node_budget: int, progress: Progress, budgets: Sequence[int] = BUDGETS
) -> list[Group]:
    """The whole study: greedy answers, each temperature and other text apart, in this order.

    Args:
        judged: at least one answer.
        node_budget: the default tree size; what is not shown for all sizes is for this one.
        progress: gets one bar for the walks; `Progress(disable=True)` for none.
        budgets: the sizes of trees beside the default one.
    """
    outputs, depths = judged.outputs, judged.drafter.depths
    shapes: list[tuple[int, int | None]] = [(depths, 1)]
    shapes += [(nodes, None) for nodes in sorted({*budgets, node_budget})]
    walks = {
        shape: walk(outputs, judged.drafter, *shape)
        for shape in progress.track(shapes, description="walking")
    }
    groups: dict[str, list[int]] = {}
    for number in sorted(range(len(outputs)), key=lambda at: _order(judged, at)):
        groups.setdefault(group_name(judged.answers[number].example.temperature), []).append(number)
    return [_judge_group(judged, name, of, walks, node_budget) for name, of in groups.items()]


def group_name(temperature: float | None) -> str:
    """How answers of one temperature are called."""
    if temperature is None:
        return "other text"
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _order(judged: Judged, number: int) -> float:
    temperature = judged.answers[number].example.temperature
    return float("inf") if temperature is None else temperature


def _judge_group(
    judged: Judged,
    name: str,
    numbers: Sequence[int],
    walks: dict[tuple[int, int | None], list[Walk]],
    node_budget: int,
) -> Group:
    outputs = [judged.outputs[number] for number in numbers]
    examples = [judged.answers[number].example for number in numbers]
    by_shape = {shape: [of_all[number] for number in numbers] for shape, of_all in walks.items()}
    usual = by_shape[node_budget, None]
    kinds = {
        kind: [at for at, example in enumerate(examples) if example.kind == kind]
        for kind in sorted({example.kind for example in examples})
    }
    halves = [walk.split(OPENING_TOKENS) for walk in usual]
    return Group(
        name=name,
        temperature=examples[0].temperature,
        answers=len(outputs),
        output_tokens=sum(map(len, outputs)),
        depths=_judge_depths(
            [judged.drafts[number] for number in numbers], judged.temperatures, usual
        ),
        chain=measured(by_shape[judged.drafter.depths, 1], outputs),
        budgets=[
            Budget(nodes=nodes, found=measured(found, outputs))
            for (nodes, branching), found in by_shape.items()
            if branching is None
        ],
        opening=_part([half[0] for half in halves], [text[:OPENING_TOKENS] for text in outputs]),
        rest=_part([half[1] for half in halves], [text[OPENING_TOKENS:] for text in outputs]),
        kinds={
            kind: measured([usual[at] for at in members], [outputs[at] for at in members])
            for kind, members in kinds.items()
        },
    )


def _part(walks: Sequence[Walk], texts: Sequence[Sequence[int]]) -> Length | None:
    """Acceptance length of the answers that have passes in this part; None where none has."""
    kept = [(walk, text) for walk, text in zip(walks, texts, strict=True) if walk.passes]
    return measured([walk for walk, _ in kept], [text for _, text in kept]) if kept else None


def measured(walks: Sequence[Walk], texts: Sequence[Sequence[int]]) -> Length:
    """Acceptance length of some answers with its interval; `texts` are their output tokens."""
    decoded = [walk.decoded for walk in walks]
    passes = [walk.passes for walk in walks]
    if len(walks) < 2:
        return Length(
            length=round(sum(decoded) / sum(passes), 4),
            low=None,
            high=None,
            answers=len(walks),
            passes=sum(passes),
            repeated=round(repeated_share(texts), 4),
        )
    found = acceptance(decoded, passes, texts)
    return Length(
        length=round(found.length, 4),
        low=round(found.low, 4),
        high=round(found.high, 4),
        answers=found.requests,
        passes=sum(passes),
        repeated=round(found.repeated, 4),
    )


def _judge_depths(
    drafts: Sequence[Drafts], temperatures: Sequence[float], walks: Sequence[Walk]
) -> list[Depth]:
    ranks = np.concatenate([item.ranks for item in drafts])
    accepted = np.array([depth for walk in walks for depth in walk.accepted])
    plain = [1.0] * len(temperatures)
    losses = negative_log_likelihood(drafts, temperatures)
    plain_losses = negative_log_likelihood(drafts, plain)
    bins, plain_bins = reliability(drafts, temperatures), reliability(drafts, plain)
    depths = []
    for depth in range(len(temperatures)):
        inside = ranks[ranks[:, depth] >= 0, depth]
        roots = max(len(inside), 1)
        top1, top5, top10 = (round(float((inside < top).sum() / roots), 4) for top in (1, 5, 10))
        depths.append(
            Depth(
                roots=len(inside),
                top1=top1,
                top5=top5,
                top10=top10,
                reached=round(float((accepted > depth).mean()), 4),
                loss=round(losses[depth], 4),
                uncalibrated_loss=round(plain_losses[depth], 4),
                error=round(calibration_error(bins[depth]), 5),
                uncalibrated_error=round(calibration_error(plain_bins[depth]), 5),
                bins=bins[depth],
                uncalibrated_bins=plain_bins[depth],
            )
        )
    return depths


def provenance(
    command: str,
    target: Path,
    target_fingerprint: str,
    checkpoint: Path,
    trained_for_this_target: bool,
    answers: Sequence[JudgedAnswer],
) -> Provenance:
    """Where and from what the figures of a study were taken."""
    machine = this_machine()
    packages = ("vllm-hidden-transfer", "torch", "transformers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    data = hashlib.sha256("".join(answer.example.digest for answer in answers).encode())
    return Provenance(
        command=command,
        machine=str(machine),
        versions={"python": platform.python_version(), **versions},
        target=target.name,
        target_fingerprint=target_fingerprint,
        checkpoint=checkpoint.name,
        checkpoint_digest=hashlib.sha256((checkpoint / WEIGHTS_FILE).read_bytes()).hexdigest()[:16],
        trained_for_this_target=trained_for_this_target,
        data_digest=data.hexdigest()[:16],
    )
