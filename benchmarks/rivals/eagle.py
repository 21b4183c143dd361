# SPDX-License-Identifier: Apache-2.0
"""An EAGLE-style drafter: one decoder layer that predicts the target's next feature.

EAGLE (arXiv 2401.15077, section 3.1): a fully connected layer joins the feature at j with the embedding of the
token at j + 1, one decoder layer predicts from that the feature at j + 1, and the target's LM head reads a draft
off it. HASS (arXiv 2408.15766): training unrolls the steps, so that later ones learn on predicted features.
A feature is the residual stream after the target's last layer, before the last norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from benchmarks.rivals.states import FinalStates
from vllm_hidden_transfer.evaluation.chained import Follow, PathDrafter
from vllm_hidden_transfer.evaluation.drafts import JudgedAnswer
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import Prefixes
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.training.objective import (
    Drafted,
    DraftingModel,
    TaughtRows,
    path_tokens,
    taught_rows,
)
from vllm_hidden_transfer.training.ridge import Moments

_ATTENTION = "hidden_transfer_rival"

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""From query [b, heads, n, dim], key and value [b, kv_heads, n, dim] and scaling to [b, n, heads, dim]."""


@dataclass(frozen=True)
class Sequences:
    """Keys and values of the layer at all positions of b sequences: [b, kv_heads, n, head_dim]."""

    keys: Tensor
    values: Tensor


class EagleLayer(nn.Module):
    """The fully connected layer, in two halves, and a decoder layer of the target's own kind.

    It starts as a copy of the target's last layer behind an fc that passes the feature through.
    """

    def __init__(self, target: FrozenTarget) -> None:
        super().__init__()
        inner, size = target.model.model, target.hidden_size
        self.feature_weight = nn.Parameter(torch.eye(size))
        # Under this name the trainer gives embeddings, which are small, the same larger rate as in our maps.
        self.token_weight = nn.Parameter(torch.zeros(size, size))
        self.bias = nn.Parameter(torch.zeros(size))
        config = copy.deepcopy(target.model.config)
        config._attn_implementation = _ATTENTION
        self.layer = type(inner.layers[-1])(config, target.num_layers - 1)
        self.layer.load_state_dict(inner.layers[-1].state_dict())
        self._rotary = inner.rotary_emb.forward  # a function: the module is the target's, not ours

    def join(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """What enters the layer [..., d]: features at j and embeddings of the tokens at j + 1, joined."""
        joined = features @ self.feature_weight.T + embeddings @ self.token_weight.T
        return joined + self.bias

    def read(self, features: Tensor, embeddings: Tensor) -> Sequences:
        """Keys and values over true features and the tokens after them, both [b, n, d].

        They depend on nothing but the position's own input, so the rest of the layer need not run.
        """
        caught: list[Tensor] = []

        def keep(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
            caught.extend((key, value))
            return torch.zeros_like(query).transpose(1, 2)

        joined = self.join(features, embeddings)
        positions = torch.arange(features.shape[1], device=features.device)[None]
        self.layer.self_attn(
            hidden_states=self.layer.input_layernorm(joined),
            position_embeddings=self._rotary(joined, positions),
            attention_mask=None,
            attend=keep,
        )
        return Sequences(*caught)

    def unroll(self, sequences: Sequences, features: Tensor, roots: Tensor, path: Tensor) -> Tensor:
        """Features predicted at root + 1 .. root + k, each from the one before it.

        Step i stands at position root + i - 1 and sees the sequence before the root and steps 1..i, in one softmax.
        The first step, at the root, is what a causal pass over the whole sequence has there.

        Args:
            sequences: of b sequences; positions before the roots at least.
            features: [b, r, d] at the roots.
            roots: int64 [b, r].
            path: [b, r, k, d], embeddings of the tokens at root + 1 .. root + k.

        Returns:
            [b, r, k, d], before the last norm.
        """
        places = torch.arange(sequences.keys.shape[2], device=roots.device)
        unseen = places >= roots[:, :, None]
        bias = torch.zeros(unseen.shape, device=roots.device).masked_fill_(unseen, float("-inf"))
        attend = _one_softmax(sequences, bias[:, None, None])
        predicted = []
        for step in range(path.shape[2]):
            joined, positions = self.join(features, path[:, :, step]), roots + step
            output = self.layer(
                joined,
                attention_mask=None,
                position_ids=positions,
                past_key_values=None,
                use_cache=False,
                position_embeddings=self._rotary(joined, positions),
                attend=attend,
            )
            features = output[0] if isinstance(output, tuple) else output
            predicted.append(features)
        return torch.stack(predicted, dim=2)


def _one_softmax(sequences: Sequences, bias: Tensor) -> Attend:
    """Attention of one row a root and step; it remembers the keys and values of the steps before."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    length = sequences.keys.shape[2]

    def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys.append(key)
        values.append(value)
        own_keys, own_values = torch.stack(keys, dim=3), torch.stack(values, dim=3)
        # Queries of one KV head side by side: [b, kv, groups, r, dim].
        scaled = (query * scaling).unflatten(1, (key.shape[1], -1))
        scores = scaled.flatten(2, 3) @ sequences.keys.transpose(-1, -2)
        scores = scores.view(*scaled.shape[:-1], length) + bias
        own = torch.einsum("bhgrd,bhrjd->bhgrj", scaled, own_keys)
        weights = torch.cat([scores, own], dim=-1).softmax(dim=-1)
        mixed = (weights[..., :length].flatten(2, 3) @ sequences.values).view(scaled.shape)
        mixed = mixed + torch.einsum("bhgrj,bhrjd->bhgrd", weights[..., length:], own_values)
        return mixed.flatten(1, 2).transpose(1, 2)

    return attend


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    attend: Attend | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' way in: whoever runs the layer says how it attends."""
    if attend is None or sliding_window is not None or softcap is not None:
        raise ValueError("the target's attention is not plain scaled dot products over all keys")
    return attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(_ATTENTION, _attention)


@torch.no_grad()
def ridge_start(
    layer: EagleLayer,
    target: FrozenTarget,
    states: FinalStates,
    examples: Sequence[Example],
    on_example: Callable[[], None] = lambda: None,
    strength: float = 1e-3,
) -> None:
    """Fit the fc in closed form: from the feature and the next token to what enters the target's last layer there.

    Then the copy of the last layer gets what it was trained for. Our maps have such a start, so a rival gets it too.
    """
    size = target.hidden_size
    moments = Moments.zeros(2 * size, size)
    for example in examples:
        tokens = torch.tensor(example.tokens)
        roots = torch.arange(max(len(example.prompt) - 1, 1), len(tokens) - 1)
        features = states.read("after", example)[roots]
        embeddings = target.embed(tokens[roots + 1]).float().cpu()
        moments.add(
            torch.cat([features, embeddings], dim=-1), states.read("before", example)[roots + 1]
        )
        on_example()
    solution = moments.solve(strength)
    layer.feature_weight.copy_(solution[:, :size])
    layer.token_weight.copy_(solution[:, size:])


@dataclass(frozen=True)
class EagleRows(TaughtRows):
    """Rows of an EAGLE-style layer; n positions, up to the one before the last root."""

    features: Tensor
    """fp32 [b, n, d]: the target's, zero beyond a sequence's end."""
    embeddings: Tensor
    """fp32 [b, n, d]: of the token after each position."""
    root_features: Tensor
    """fp32 [b, r, d]."""
    path: Tensor
    """fp32 [b, r, k, d]: embeddings of the tokens at root + 1 .. root + k."""
    true_features: Tensor
    """fp32 [b, r, k, d]: the target's at root + 1 .. root + k."""


class EagleInTraining(DraftingModel[EagleRows]):
    """An EAGLE-style layer among the trainer's drafters."""

    def __init__(
        self,
        target: FrozenTarget,
        cache: Prefixes,
        states: FinalStates,
        layer: EagleLayer,
        steps: int,
        feature_loss: float = 0.0,
    ) -> None:
        """`feature_loss` is the weight of the smooth L1 distance to the true features (EAGLE, section 3.2)."""
        super().__init__(target, cache, layer, steps)
        self.layer = layer
        self._states, self._feature_loss = states, feature_loss

    @property
    def identity(self) -> dict[str, str]:
        """What it learns beside the KL."""
        return {"drafter": "eagle", "feature_loss": f"{self._feature_loss:g}"}

    def rows(self, examples: list[Example], roots: list[list[int]]) -> EagleRows:
        """Rows with the features of their sequences."""
        device, size = self.target.device, self.target.hidden_size
        length = max(map(max, roots))
        features = torch.zeros(len(examples), length, size)
        following = torch.zeros(len(examples), length, dtype=torch.int64)
        at_roots, true = [], []
        offsets = torch.arange(1, self.steps + 1)
        for row, (example, of_example) in enumerate(zip(examples, roots, strict=True)):
            after, tokens = self._states.read("after", example), torch.tensor(example.tokens)
            last = len(tokens) - 1
            inside = min(length, last)
            features[row, :inside] = after[:inside]
            following[row, :inside] = tokens[1 : inside + 1]
            at_roots.append(after[of_example])
            places = torch.tensor(of_example)[:, None] + offsets
            true.append(after[places.clamp(max=last)])
        taught = taught_rows(self.cache, examples, roots, self.steps, device)
        return EagleRows(
            **vars(taught),
            features=features.to(device),
            embeddings=self.target.embed(following).float(),
            root_features=torch.stack(at_roots).to(device),
            path=self.target.embed(path_tokens(examples, roots, self.steps)).float(),
            true_features=torch.stack(true).to(device),
        )

    def draft(self, rows: EagleRows) -> Drafted:
        """k steps, each on the feature that the one before predicted."""
        sequences = self.layer.read(rows.features, rows.embeddings)
        predicted = self.layer.unroll(sequences, rows.root_features, rows.roots, rows.path)
        penalty = None
        if self._feature_loss:
            distance = nn.functional.smooth_l1_loss(
                predicted, rows.true_features, reduction="none"
            ).mean(-1)
            penalty = self._feature_loss * distance
        return Drafted(self.final(predicted), penalty)

    def final(self, features: Tensor) -> Tensor:
        """What the LM head reads: features after the target's last norm."""
        normed: Tensor = self.target.model.model.norm(features.to(self.target.dtype))
        return normed


class EagleDrafter(PathDrafter):
    """Trees of an EAGLE-style layer: every node is expanded on the features predicted along its own path."""

    def __init__(
        self,
        model: EagleInTraining,
        answers: Sequence[JudgedAnswer],
        temperatures: Sequence[float],
    ) -> None:
        super().__init__(model.target.head_weight, answers, temperatures)
        self._model = model

    def _follow(self, examples: list[Example], roots: Tensor) -> Follow:
        model = self._model
        rows = model.rows(examples, roots[:, None].tolist())
        sequences = model.layer.read(rows.features, rows.embeddings)

        def follow(paths: Tensor) -> Tensor:
            groups = paths.shape[1]
            predicted = model.layer.unroll(
                sequences,
                rows.root_features.expand(-1, groups, -1),
                rows.roots.expand(-1, groups),
                model.target.embed(paths).float(),
            )
            return model.final(predicted[:, :, -1])

        return follow
