# SPDX-License-Identifier: Apache-2.0
"""Acceptance on recorded answers, without an engine: quick figures to steer training by.

The recorded answer stands for what the target samples: a draft token is accepted where it equals
the answer's token. For greedy answers that is exactly what the engine does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_hidden_transfer.training.cache import Example, PrefixCache
from vllm_hidden_transfer.training.objective import collect_rows
from vllm_hidden_transfer.training.target import FrozenTarget
from vllm_hidden_transfer.transfer import TransferMaps
from vllm_hidden_transfer.tree import most_probable_paths

WIDTH = 32
TEMPERATURES = np.arange(0.7, 1.61, 0.1).round(2)


@dataclass(frozen=True)
class Drafts:
    """Draft distributions at every root of one answer; n roots, k depths."""

    example: Example
    tokens: NDArray[np.int64]
    """[n, k, width]: most probable first."""
    logits: NDArray[np.float32]
    """[n, k, width]: their logits."""
    log_totals: NDArray[np.float32]
    """[n, k, temperatures]: log of the sum of exp(logits / temperature) over the vocabulary."""
    next_logits: NDArray[np.float32]
    """[n, k]: logit of the token that came; NaN beyond the end of the answer."""

    def log_probabilities(self, temperatures: Sequence[float]) -> NDArray[np.float64]:
        """log softmax(logits / temperature of the depth) of the kept tokens [n, k, width]."""
        chosen = [int(np.abs(TEMPERATURES - t).argmin()) for t in temperatures]
        totals = np.stack([self.log_totals[:, i, c] for i, c in enumerate(chosen)], axis=1)
        scale = TEMPERATURES[chosen][None, :, None]
        return self.logits.astype(np.float64) / scale - totals[:, :, None]


@torch.no_grad()
def draft(
    target: FrozenTarget,
    cache: PrefixCache,
    maps: TransferMaps,
    example: Example,
    max_tokens: int = 96,
) -> Drafts:
    """Drafts at every root of the first `max_tokens` tokens of an answer."""
    start = len(example.prompt) - 1
    end = min(len(example.tokens) - 2, start + max_tokens - 1)
    roots = list(range(start, end))
    rows = collect_rows(cache, target, [example], [roots], maps.num_steps)
    pseudo = maps(rows.hidden[0], rows.token_embedding[0])[None]
    final = target.run_rows(pseudo, rows.roots, rows.prefixes)[0]
    tokens, kept, totals, came = [], [], [], []
    for row in range(len(roots)):
        logits = final[row] @ target.head_weight.T
        top, ids = logits.topk(WIDTH, dim=-1)
        tokens.append(ids)
        kept.append(top)
        totals.append(
            torch.stack([(logits / t).logsumexp(-1) for t in TEMPERATURES.tolist()], dim=-1)
        )
        came.append(logits.gather(1, rows.next_tokens[0, row][:, None])[:, 0])
    next_logits = torch.stack(came).masked_fill(~rows.valid[0], float("nan"))
    return Drafts(
        example=example,
        tokens=torch.stack(tokens).numpy(),
        logits=torch.stack(kept).numpy(),
        log_totals=torch.stack(totals).numpy(),
        next_logits=next_logits.numpy(),
    )


def calibrate(drafts: Sequence[Drafts]) -> list[float]:
    """The softmax temperature of each depth with the least negative log-likelihood."""
    totals = np.concatenate([d.log_totals for d in drafts])
    came = np.concatenate([d.next_logits for d in drafts])
    losses = totals - came[:, :, None] / TEMPERATURES
    best = np.nanmean(losses, axis=0).argmin(axis=-1)
    return [round(float(TEMPERATURES[i]), 4) for i in best]


@dataclass(frozen=True)
class Acceptance:
    """What a walk over recorded answers gave."""

    length: float
    """Acceptance length: tokens after the first, per decode pass."""
    by_depth: list[float]
    """Share of passes whose accepted path reached each depth."""
    accuracy: list[float]
    """Share of roots whose most probable draft token at each depth is the one that came."""
    tokens: int
    passes: int


def walk(drafts: Sequence[Drafts], temperatures: Sequence[float], budget: int = 16) -> Acceptance:
    """Walk the answers with best-first trees of `budget` nodes."""
    depths = drafts[0].tokens.shape[1]
    reached = np.zeros(depths)
    tokens = passes = 0
    for item in drafts:
        answer = item.example.answer
        end = len(item.tokens) + 1  # answer tokens that take part; the first comes from the prompt
        trees = most_probable_paths(item.tokens, item.log_probabilities(temperatures), budget)
        place = 0  # index of the last token that is known
        while place + 1 < end:
            node, depth = -1, 0
            while depth < depths and place + 1 + depth < end:
                child = trees[place].child(node, answer[place + 1 + depth])
                if child is None:
                    break
                reached[depth] += 1
                node, depth = child, depth + 1
            passes += 1
            produced = min(depth + 1, end - 1 - place)
            tokens += produced
            place += produced
    came = [np.isfinite(item.next_logits) for item in drafts]
    hits = sum(
        ((item.logits[:, :, 0] <= item.next_logits) & ok).sum(0)
        for item, ok in zip(drafts, came, strict=True)
    )
    accuracy = np.asarray(hits) / np.maximum(sum(ok.sum(0) for ok in came), 1)
    return Acceptance(
        length=tokens / max(passes, 1),
        by_depth=(reached / max(passes, 1)).round(4).tolist(),
        accuracy=accuracy.round(4).tolist(),
        tokens=tokens,
        passes=passes,
    )
