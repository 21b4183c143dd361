# SPDX-License-Identifier: Apache-2.0
"""The drafters that are compared, and what is particular to each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from benchmarks.rivals.eagle import EagleDrafter, EagleInTraining, EagleLayer, ridge_start
from benchmarks.rivals.medusa import MedusaHeads, MedusaInTraining
from benchmarks.rivals.states import FinalStates
from vllm_hidden_transfer.checkpoint.config import Conditioning
from vllm_hidden_transfer.checkpoint.maps import TransferMaps
from vllm_hidden_transfer.evaluation.drafts import Drafts
from vllm_hidden_transfer.evaluation.study import maps_drafter
from vllm_hidden_transfer.evaluation.walks import Drafter, OnePassDrafter
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import Prefixes
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.training.layer_choice import draft_share
from vllm_hidden_transfer.training.objective import DraftingModel, MapsInTraining
from vllm_hidden_transfer.training.ridge import ridge_maps, ridge_passes


@dataclass(frozen=True)
class Sources:
    """What drafters learn and draft from: the target and what it says of every token of the data."""

    target: FrozenTarget
    prefixes: Prefixes
    states: FinalStates
    steps: int
    """k."""


class Choice(BaseModel):
    """What a sweep chooses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float
    start: str
    feature_loss: float = 0.0
    """Of EAGLE: weight of the distance to the true features beside the KL."""
    embedding_scale: float = 16.0
    """Learning rate of the embedding's weights over that of the others."""

    @property
    def label(self) -> str:
        """For names of folders."""
        return f"{self.start}-{self.learning_rate:g}-{self.feature_loss:g}-{self.embedding_scale:g}"


class Contestant(ABC):
    """One kind of drafter."""

    name: str
    title: str
    start: str
    """Its first start; a sweep may try others."""
    rates: tuple[float, ...]
    """Learning rates to try."""
    variants: tuple[dict[str, Any], ...] = ()
    """Changes to try at the best of them."""

    @abstractmethod
    def module(self, sources: Sources) -> nn.Module:
        """Its weights before any start."""

    @abstractmethod
    def begin(
        self,
        sources: Sources,
        module: nn.Module,
        start: str,
        examples: Sequence[Example],
        on_example: Callable[[], None],
    ) -> None:
        """Give the weights a start, in place."""

    def passes(self, start: str, steps: int) -> int:
        """How often a start goes through the examples."""
        return int(start == "ridge")

    @abstractmethod
    def model(self, sources: Sources, module: nn.Module, choice: Choice) -> DraftingModel[Any]:
        """The weights as the trainer takes them."""

    @abstractmethod
    def drafter(
        self,
        sources: Sources,
        model: DraftingModel[Any],
        drafts: Sequence[Drafts],
        temperatures: Sequence[float],
    ) -> Drafter:
        """Its trees over answers whose one-path drafts are given."""

    @abstractmethod
    def share(self, sources: Sources, module: nn.Module) -> float:
        """Weights that drafting k tokens reads, over those that a pass of the target reads."""


class Maps(Contestant):
    """Transfer maps of one form."""

    start = "ridge"
    rates = (5e-4, 8e-4, 1.2e-3)

    def __init__(self, name: str, title: str, conditioning: Conditioning) -> None:
        self.name, self.title, self.conditioning = name, title, conditioning

    def module(self, sources: Sources) -> TransferMaps:
        return TransferMaps(sources.steps, sources.target.hidden_size, self.conditioning)

    def begin(
        self,
        sources: Sources,
        module: nn.Module,
        start: str,
        examples: Sequence[Example],
        on_example: Callable[[], None],
    ) -> None:
        parts = (sources.prefixes, sources.target, examples, sources.steps, self.conditioning)
        module.load_state_dict(ridge_maps(*parts, on_example=on_example).state_dict())

    def passes(self, start: str, steps: int) -> int:
        return ridge_passes(steps, self.conditioning)

    def model(self, sources: Sources, module: nn.Module, choice: Choice) -> MapsInTraining:
        assert isinstance(module, TransferMaps)
        return MapsInTraining(sources.target, sources.prefixes, module)

    def drafter(
        self,
        sources: Sources,
        model: DraftingModel[Any],
        drafts: Sequence[Drafts],
        temperatures: Sequence[float],
    ) -> Drafter:
        assert isinstance(model.module, TransferMaps)
        return maps_drafter(sources.target, sources.prefixes, model.module, drafts, temperatures)

    def share(self, sources: Sources, module: nn.Module) -> float:
        whole = draft_share(sources.target, 0)
        maps = draft_share(sources.target, _size(module)) - whole
        return (sources.steps if self.conditioning == "chained" else 1) * whole + maps


class Medusa(Contestant):
    """Medusa heads with the target's own LM head."""

    name, title, start = "medusa", "Medusa heads, shared LM head", "zero"
    rates = (1e-3, 3e-3, 8e-3)

    def module(self, sources: Sources) -> MedusaHeads:
        return MedusaHeads(sources.steps, sources.target.hidden_size)

    def begin(
        self,
        sources: Sources,
        module: nn.Module,
        start: str,
        examples: Sequence[Example],
        on_example: Callable[[], None],
    ) -> None:
        """As published, they start at zero."""

    def model(self, sources: Sources, module: nn.Module, choice: Choice) -> MedusaInTraining:
        assert isinstance(module, MedusaHeads)
        return MedusaInTraining(sources.target, sources.prefixes, sources.states, module)

    def drafter(
        self,
        sources: Sources,
        model: DraftingModel[Any],
        drafts: Sequence[Drafts],
        temperatures: Sequence[float],
    ) -> Drafter:
        return OnePassDrafter(drafts, temperatures)

    def share(self, sources: Sources, module: nn.Module) -> float:
        """All heads share one reading of the LM head."""
        target = sources.target
        return (_size(module) + target.head_weight.numel()) / _read_by_target(target)


class Eagle(Contestant):
    """An EAGLE-style layer."""

    name, title, start = "eagle", "EAGLE-style layer", "ridge"
    rates = (3e-4, 1e-3, 3e-3)
    variants = ({"start": "copy"}, {"feature_loss": 1.0}, {"embedding_scale": 1.0})

    def module(self, sources: Sources) -> EagleLayer:
        return EagleLayer(sources.target)

    def begin(
        self,
        sources: Sources,
        module: nn.Module,
        start: str,
        examples: Sequence[Example],
        on_example: Callable[[], None],
    ) -> None:
        """A new layer is a copy of the target's last; "ridge" fits its fc besides."""
        assert isinstance(module, EagleLayer)
        if start == "ridge":
            ridge_start(module, sources.target, sources.states, examples, on_example)

    def model(self, sources: Sources, module: nn.Module, choice: Choice) -> EagleInTraining:
        assert isinstance(module, EagleLayer)
        parts = (sources.target, sources.prefixes, sources.states, module, sources.steps)
        return EagleInTraining(*parts, choice.feature_loss)

    def drafter(
        self,
        sources: Sources,
        model: DraftingModel[Any],
        drafts: Sequence[Drafts],
        temperatures: Sequence[float],
    ) -> Drafter:
        assert isinstance(model, EagleInTraining)
        return EagleDrafter(model, [item.answer for item in drafts], temperatures)

    def share(self, sources: Sources, module: nn.Module) -> float:
        """Every one of the k steps reads the layer and the LM head."""
        target = sources.target
        one = (_size(module) + target.head_weight.numel()) / _read_by_target(target)
        return sources.steps * one


CONTESTANTS: dict[str, Contestant] = {
    each.name: each
    for each in (
        Maps("published", "transfer maps as published, one pass", "none"),
        Maps("token", "token-conditioned transfer maps, one pass", "token"),
        Maps("chained", "chained transfer maps, k passes", "chained"),
        Medusa(),
        Eagle(),
    )
}


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _read_by_target(target: FrozenTarget) -> int:
    """Weights that a pass of the target reads: its layers and the LM head."""
    layers = sum(_size(layer) for layer in target.model.model.layers)
    return layers + target.head_weight.numel()
