# SPDX-License-Identifier: Apache-2.0
"""Trees that cost next to nothing and stay on the device: for the time of a verification step by itself.

Planted drafts of the tests are built on the host, which waits for the device: their steps would be timed with the wait,
and VLLM_GPU_SYNC_CHECK=error would end them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import common  # noqa: F401  finds the project
import numpy as np
import torch

from tests.doubles.planted import RANK_PROBABILITIES
from vllm_hidden_transfer.tree import TreeTensors, most_probable_paths

if TYPE_CHECKING:
    from vllm_hidden_transfer.engine.v2.runner import TreeRunnerV2
    from vllm_hidden_transfer.engine.v2.slot_batch import SlotBatch

SOURCE = f"{__name__}:FixedTrees"
DEPTHS = 4


class FixedTrees:
    """The same bushy tree every step: the last sampled token again along the first path, other tokens elsewhere."""

    transfer_layer: int | None = None
    draft_rows = 0

    def __init__(self, runner: TreeRunnerV2) -> None:
        budget, device = runner.num_speculative_steps, runner.device
        rng = np.random.default_rng(0)
        size = (1, DEPTHS, len(RANK_PROBABILITIES))
        tokens = rng.integers(0, runner.model_config.get_vocab_size(), size)
        scores = np.log(np.broadcast_to(RANK_PROBABILITIES, size))
        self._tree = TreeTensors.of(most_probable_paths(tokens, scores, budget), budget, device)
        # Path by path: the first one lasts while each node hangs off the one before it.
        follows = self._tree.parents == torch.arange(budget, device=device) - 1
        self._on_path = follows.cumprod(1).bool()

    def describe(self) -> str:
        return "fixed drafts (a measurement)"

    def on_target_loaded(self, model: Any) -> None:
        """It needs nothing of the target."""

    def propose_tensors(self, batch: SlotBatch) -> TreeTensors:
        tree, requests = self._tree, len(batch.slots)
        tokens = torch.where(self._on_path, batch.sampled[:, None], tree.tokens)
        parts = (part.expand(requests, -1).contiguous() for part in (tree.parents, tree.alive))
        return TreeTensors(tokens, *parts)
