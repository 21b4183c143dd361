# SPDX-License-Identifier: Apache-2.0
"""Two-pass hidden-transfer drafting under the V2 runner: ``draft_pass`` on its slots, all of it tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_hidden_transfer.drafting.distributions import candidates
from vllm_hidden_transfer.engine.draft_pass import DraftPass
from vllm_hidden_transfer.engine.v2.slot_batch import SlotBatch
from vllm_hidden_transfer.tree import TreeTensors, most_probable

if TYPE_CHECKING:
    from vllm_hidden_transfer.engine.v2.runner import TreeRunnerV2


class TransferSourceV2:
    """Drafts with the maps of a transfer checkpoint, for every request of a step.

    Pseudo rows stand at the positions of the tokens to come, as under V1. A request in the middle of its prompt
    drafts too, because who does is known on the device only; vLLM's scheduler does not use those drafts.

    The whole LM head is read, a draft vocabulary or not: which tokens a request has of its own is known on the device
    only, and the list without them loses in acceptance what it saves in bytes (2.81 tokens a pass against 2.94 with
    them and 3.03 with the whole head, offline on the demo target).
    """

    def __init__(self, runner: TreeRunnerV2, checkpoint: str) -> None:
        self._runner = runner
        self._pass = DraftPass(checkpoint, runner.vllm_config, runner.device)
        config = self._pass.config
        self.transfer_layer: int | None = config.transfer_layer
        self.draft_rows = self._pass.steps
        self._temperatures = torch.tensor(
            config.calibration.temperatures, dtype=torch.float32, device=runner.device
        )

    def describe(self) -> str:
        return self._pass.describe()

    def on_target_loaded(self, model: Any) -> None:
        self._pass.on_target_loaded(model)

    def propose_tensors(self, batch: SlotBatch) -> TreeTensors:
        logits = self.draft_logits(batch)
        found = candidates(logits, self._temperatures, batch.budget, self._pass.bigram)
        self._runner.forget_drafts(found.broken)
        return most_probable(found, batch.budget)

    def draft_logits(self, batch: SlotBatch) -> torch.Tensor:
        """The draft pass: logits [b, k, vocabulary] for the depths 1..k of every request's tree."""
        assert batch.hidden is not None
        runner, steps = self._runner, self._pass.steps
        pseudo = self._pass.pseudo_states(runner.model, batch.hidden, batch.sampled)
        # Row 1 stands where the sampled token will.
        positions = batch.roots[:, None] + torch.arange(steps, device=batch.roots.device)
        attention = runner.draft_attention(batch, positions)
        rope = positions.clamp(max=runner.max_model_len - 1).flatten()
        states = self._pass.states(runner.model, pseudo, rope, attention)
        model: Any = runner.model
        logits: torch.Tensor = model.compute_logits(states.flatten(0, 1))
        return logits.unflatten(0, states.shape[:2])
