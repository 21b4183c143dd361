# SPDX-License-Identifier: Apache-2.0
"""Train the bigram re-weighting of finished one-pass maps: the maps stay, only the scores of pairs learn."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from vllm_hidden_transfer.checkpoint.maps import BigramMaps, TransferMaps
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import Prefixes
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.training.objective import (
    Drafted,
    DraftingModel,
    MapsInTraining,
    Rows,
)
from vllm_hidden_transfer.training.trainer import TrainingConfig

LEARNING_RATE = 4e-3
_START = 4.0
"""Root mean square of what `down` makes of an embedding at the start."""


class BigramInTraining(DraftingModel[Rows]):
    """The target's distribution after the token that came, from the maps' states and that token."""

    def __init__(
        self, target: FrozenTarget, cache: Prefixes, maps: TransferMaps, rank: int, seed: int
    ) -> None:
        bigram = BigramMaps(maps.num_steps, maps.hidden_size, rank)
        size = target.embed(torch.arange(target.vocab_size)).float().norm(dim=-1).mean()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            bigram.down.normal_(std=float(_START / size), generator=generator)
        super().__init__(target, cache, bigram, maps.num_steps)
        self.bigram = bigram
        self._maps = maps.float().to(target.device).requires_grad_(False)
        self._rows = MapsInTraining(target, cache, self._maps)

    @property
    def identity(self) -> dict[str, str]:
        """The maps whose drafts are re-weighted."""
        digest = hashlib.sha256()
        for parameter in self._maps.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
        return {"bigram_of": digest.hexdigest()[:16]}

    def rows(self, examples: list[Example], roots: list[list[int]]) -> Rows:
        """The maps' own rows."""
        return self._rows.rows(examples, roots)

    def draft(self, rows: Rows) -> Drafted:
        """States after the last norm; those of the depths 2..k know the token before them."""
        with torch.no_grad():
            final = self._rows.draft(rows).final
            embedding = self.target.embed(rows.next_tokens[:, :, :-1]).float()
        moved = self.bigram(embedding.flatten(0, 1)).unflatten(0, final.shape[:2])
        return Drafted(final + nn.functional.pad(moved, (0, 0, 1, 0)).to(final.dtype))


def bigram_folder(folder: Path) -> Path:
    """Where the state of this stage lies, beside the maps' own."""
    return folder.with_name(f"{folder.name}-bigram")


def bigram_config(config: TrainingConfig, steps: int) -> TrainingConfig:
    """Settings of this stage of a run: a pass is half as dear as one with gradients, so it takes twice the roots."""
    return config.model_copy(
        update={"steps": steps, "roots": 2 * config.roots, "learning_rate": LEARNING_RATE}
    )
