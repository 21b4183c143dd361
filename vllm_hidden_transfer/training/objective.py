# SPDX-License-Identifier: Apache-2.0
"""What drafters learn: the target's own next-token distribution at the positions that they draft for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vllm_hidden_transfer.checkpoint.maps import TransferMaps
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import Prefixes
from vllm_hidden_transfer.offline.target import FrozenTarget, SharedPrefixes

_CHUNK = 128


@dataclass(frozen=True)
class TaughtRows:
    """What the rows of one optimiser step should predict: b sequences, r roots each, k rows a root."""

    roots: Tensor
    """int64 [b, r]."""
    teacher_ids: Tensor
    """int64 [b, r, k, width]: the target's most probable tokens at each row's position."""
    teacher_probs: Tensor
    """fp32 [b, r, k, width], summing to 1; zero where `valid` is not."""
    next_tokens: Tensor
    """int64 [b, r, k]: the token that follows each row in the corpus."""
    valid: Tensor
    """bool [b, r, k]: the row lies inside its sequence."""


@dataclass(frozen=True)
class Rows(TaughtRows):
    """Rows of transfer maps, with what the maps see and what the rows attend to."""

    hidden: Tensor
    """fp32 [b, r, d]: the residual stream entering layer t at each root."""
    token_embedding: Tensor
    """fp32 [b, r, d]: input embedding of the token at root + 1; for chained maps [b, r, k, d]: of those at
    root + 1 .. root + k."""
    prefixes: SharedPrefixes


@dataclass(frozen=True)
class Drafted:
    """What a drafter makes of rows."""

    final: Tensor
    """[b, r, k, d] after the last norm: the LM head reads it."""
    penalty: Tensor | None = None
    """[b, r, k]: what is added to each row's KL."""


RowsT = TypeVar("RowsT", bound=TaughtRows)


class DraftingModel(ABC, Generic[RowsT]):
    """A drafter in training: its weights, the rows that it asks for, and what it hands to the LM head."""

    def __init__(
        self, target: FrozenTarget, cache: Prefixes, module: nn.Module, steps: int
    ) -> None:
        self.target, self.cache, self.module, self.steps = target, cache, module, steps

    @property
    @abstractmethod
    def identity(self) -> dict[str, str]:
        """What tells one drafter's run from another's, beside settings and data."""

    @abstractmethod
    def rows(self, examples: list[Example], roots: list[list[int]]) -> RowsT:
        """Rows for the given roots (equally many for every example) of cached examples."""

    @abstractmethod
    def draft(self, rows: RowsT) -> Drafted:
        """Draft for rows; gradients flow to the module's weights."""


class MapsInTraining(DraftingModel[Rows]):
    """Transfer maps: pseudo states of all steps run through the target's upper layers together."""

    def __init__(self, target: FrozenTarget, cache: Prefixes, maps: TransferMaps) -> None:
        super().__init__(target, cache, maps, maps.num_steps)
        self._maps = maps

    @property
    def identity(self) -> dict[str, str]:
        """The form of the maps."""
        return {"conditioning": self._maps.conditioning}

    def rows(self, examples: list[Example], roots: list[list[int]]) -> Rows:
        """See `collect_rows`."""
        chained = self._maps.conditioning == "chained"
        return collect_rows(self.cache, self.target, examples, roots, self.steps, chained)

    def draft(self, rows: Rows) -> Drafted:
        """States after the last norm of all rows."""
        pseudo = self._maps(rows.hidden.flatten(0, 1), rows.token_embedding.flatten(0, 1))
        pseudo = pseudo.unflatten(0, rows.roots.shape)
        return Drafted(self.target.run_rows(pseudo, rows.roots, rows.prefixes))


@dataclass(frozen=True)
class Candidates:
    """The part of the vocabulary that one step's softmax runs over.

    The LM head is half of a row's cost. The tokens that the target ever finds likely on the corpus
    are always in; a random sample stands for the rest, its logits raised by log(rest / sample), so
    that the partition function has the right expectation.
    """

    head: Tensor
    """[c, d]: their rows of the LM head."""
    bias: Tensor
    """[c]: what is added to their logits."""
    places: Tensor
    """int64 [vocabulary]: token to candidate; -1 where it is none."""

    @classmethod
    def everything(cls, head: Tensor) -> Candidates:
        """The whole vocabulary: the exact loss."""
        device = head.device
        return cls(
            head, torch.zeros(len(head), device=device), torch.arange(len(head), device=device)
        )

    @classmethod
    def sample(cls, head: Tensor, core: Tensor, count: int, rng: np.random.Generator) -> Candidates:
        """All of `core` (token ids) and `count` random others."""
        others = np.ones(len(head), dtype=bool)
        others[core.numpy()] = False
        rest = np.flatnonzero(others)
        count = min(count, len(rest))
        drawn = torch.from_numpy(rng.choice(rest, size=count, replace=False))
        tokens = torch.cat([core, drawn])
        bias = torch.zeros(len(tokens))
        if count:
            bias[len(core) :] = float(np.log(len(rest) / count))
        places = torch.full((len(head),), -1, dtype=torch.int64)
        places[tokens] = torch.arange(len(tokens))
        device = head.device
        return cls(head[tokens.to(device)], bias.to(device), places.to(device))


def taught_rows(
    cache: Prefixes,
    examples: list[Example],
    roots: list[list[int]],
    steps: int,
    device: torch.device,
) -> TaughtRows:
    """What rows at the given roots (equally many for every example) of cached examples should predict."""
    root_ids = torch.tensor(roots)
    offsets = torch.arange(1, steps + 1)
    next_tokens, valid, ids, probs = [], [], [], []
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.tokens)
        last = len(tokens) - 1
        positions = root_ids[row][:, None] + offsets
        valid.append(positions < last)  # the last token has no successor in the corpus
        positions = positions.clamp(max=last)
        next_tokens.append(tokens[(positions + 1).clamp(max=last)])
        ids.append(cache.read("teacher_ids", example, torch.int64)[positions])
        probs.append(cache.read("teacher_probs", example)[positions])
    inside = torch.stack(valid)
    teacher = torch.stack(probs)
    # The kept tokens hold nearly all of the mass; what is left out is spread over them.
    teacher = teacher / teacher.sum(-1, keepdim=True).clamp_min(1e-9)
    return TaughtRows(
        roots=root_ids.to(device),
        teacher_ids=torch.stack(ids).to(device),
        teacher_probs=(teacher * inside[..., None]).to(device),
        next_tokens=torch.stack(next_tokens).to(device),
        valid=inside.to(device),
    )


def path_tokens(examples: list[Example], roots: list[list[int]], steps: int) -> Tensor:
    """int64 [b, r, steps]: the tokens at root + 1 .. root + steps; the last token beyond an end."""
    offsets = torch.arange(1, steps + 1)
    paths = []
    for example, of_example in zip(examples, roots, strict=True):
        tokens = torch.tensor(example.tokens)
        positions = torch.tensor(of_example)[:, None] + offsets
        paths.append(tokens[positions.clamp(max=len(tokens) - 1)])
    return torch.stack(paths)


def collect_rows(
    cache: Prefixes,
    target: FrozenTarget,
    examples: list[Example],
    roots: list[list[int]],
    steps: int,
    chained: bool = False,
) -> Rows:
    """Rows for the given roots (equally many for every example) of cached examples, on the target's device.

    `chained` collects the token of every step, not only the first one.
    """
    device = target.device
    hidden = [cache.read("hidden", e)[of_e] for e, of_e in zip(examples, roots, strict=True)]
    path = path_tokens(examples, roots, steps)
    prefixes = cache.prefixes(examples)
    return Rows(
        **vars(taught_rows(cache, examples, roots, steps, device)),
        hidden=torch.stack(hidden).to(device),
        token_embedding=target.embed(path if chained else path[:, :, 0]).float(),
        prefixes=SharedPrefixes(prefixes.keys.to(device), prefixes.values.to(device)),
    )


def draw_roots(rng: np.random.Generator, example: Example, count: int) -> list[int]:
    """Distinct random roots at which the target has just sampled an answer token."""
    # Root r drafts for r + 2 onwards; the last root that has one row inside is length - 3.
    first, last = max(len(example.prompt) - 1, 1), len(example.tokens) - 3
    available = last - first + 1
    chosen = rng.choice(available, size=min(count, available), replace=False)
    if available < count:
        chosen = np.concatenate([chosen, rng.integers(available, size=count - available)])
    return sorted((chosen + first).tolist())


class _HeadLoss(torch.autograd.Function):
    """Weighted KL(teacher || softmax(hidden W^T)), summed over rows; W has no gradient.

    The gradient is taken chunk by chunk in the forward pass: one [chunk, vocabulary] buffer
    instead of several [rows, vocabulary] ones.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor,
        teacher_ids: Tensor,
        teacher_probs: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.empty_like(hidden)
        losses = torch.empty(len(hidden), device=hidden.device)
        tops = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
        for start in range(0, len(hidden), _CHUNK):
            part = slice(start, start + _CHUNK)
            logits = (hidden[part] @ head.T).float().add_(bias)
            ids, probs = teacher_ids[part], teacher_probs[part]
            best, tops[part] = logits.max(dim=-1)
            picked = logits.gather(1, ids)
            student = logits.sub_(best[:, None]).exp_()
            total = student.sum(dim=-1)
            log_student = picked - (best + total.log())[:, None]
            losses[part] = (probs * (probs.clamp_min(1e-12).log() - log_student)).sum(-1)
            student.div_(total[:, None]).scatter_add_(1, ids, -probs)
            gradient[part] = (student.to(head.dtype) @ head) * weights[part, None]
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses, tops)
        return (losses * weights).sum(), losses, tops

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None, None, None


@dataclass(frozen=True)
class Loss:
    """One step's loss, and its parts for the log."""

    total: Tensor
    kl: Tensor
    """[k]: KL at each depth, summed over the valid rows."""
    agreed: Tensor
    """[k]: valid rows whose most probable token is the target's."""
    counts: Tensor
    """[k]: valid rows."""


def draft_loss(
    target: FrozenTarget,
    drafted: Drafted,
    rows: TaughtRows,
    step_weights: Tensor,
    candidates: Candidates | None = None,
    weight_sum: Tensor | None = None,
) -> Loss:
    """KL from the target to the drafts and their penalty, step i weighted by ``step_weights[i]``.

    Args:
        target: the frozen target.
        drafted: what the drafter makes of the rows.
        rows: what they should predict.
        step_weights: [k].
        candidates: the tokens to normalise over; all of them unless given.
        weight_sum: what the rows' weights are divided by; their sum unless given, which one process of several
            does not know by itself.
    """
    if candidates is None:
        candidates = Candidates.everything(target.head_weight)
    places = candidates.places[rows.teacher_ids]
    probs = rows.teacher_probs * (places >= 0)
    probs = probs / probs.sum(-1, keepdim=True).clamp_min(1e-9)
    weights = rows.valid * step_weights
    weights = weights / (weights.sum() if weight_sum is None else weight_sum).clamp_min(1e-9)
    total, losses, tops = _HeadLoss.apply(
        drafted.final.flatten(0, 2),
        candidates.head,
        candidates.bias,
        places.clamp_min(0).flatten(0, 2),
        probs.flatten(0, 2),
        weights.flatten(),
    )
    if drafted.penalty is not None:
        total = total + (drafted.penalty * weights).sum()
    agreed = (tops == places[..., 0].flatten()).view(rows.valid.shape) & rows.valid
    kl = losses.view(rows.valid.shape) * rows.valid
    return Loss(
        total=total,
        kl=kl.flatten(0, 1).sum(0),
        agreed=agreed.flatten(0, 1).sum(0).float(),
        counts=rows.valid.flatten(0, 1).sum(0).float(),
    )
