# SPDX-License-Identifier: Apache-2.0
"""Which layer to transfer at: more layers above it draft better and cost more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_hidden_transfer.offline.target import FrozenTarget

SHARES = (0.45, 0.55, 0.65, 0.8)
"""Depths that are tried, as shares of the target's layers; below the first, drafting costs most of a step."""


@dataclass(frozen=True)
class Candidate:
    """One layer, and what a small run there gave."""

    layer: int
    acceptance_length: float
    draft_share: float
    """Bytes that a draft pass reads (upper layers, LM head, maps) over those of a target pass."""

    @property
    def worth(self) -> float:
        """Expected tokens per unit of cost; no speculation is 1."""
        return self.acceptance_length / (1.0 + self.draft_share)


def candidate_layers(num_layers: int) -> list[int]:
    """The layers to try, ascending."""
    return sorted({min(num_layers - 1, round(share * num_layers)) for share in SHARES})


def draft_share(target: FrozenTarget, map_parameters: int) -> float:
    """Parameters that a draft pass reads over those that a target pass reads.

    Tied or not, an LM head is read once a pass, and an embedding only a row at a time.
    """
    layers = [
        sum(parameter.numel() for parameter in layer.parameters())
        for layer in target.model.model.layers
    ]
    head = target.head_weight.numel()
    upper = sum(layers[target.transfer_layer :])
    return (upper + head + map_parameters) / (sum(layers) + head)


def choose_layer(layers: Sequence[int], try_layer: Callable[[int], Candidate]) -> list[Candidate]:
    """Try the layers; the best one comes first."""
    return sorted((try_layer(layer) for layer in layers), key=lambda found: -found.worth)
