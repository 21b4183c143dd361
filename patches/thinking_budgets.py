# SPDX-License-Identifier: Apache-2.0
"""Thinking budgets (``thinking_token_budget``) beside requests that have none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm_hidden_transfer.patches.base import Patch, Surface

_HOLDER = "vllm.v1.sample.thinking_budget_state"


def mended_holder(reasoning_config: Any, max_num_reqs: int, device: Any) -> Any:
    """vLLM's keeper of thinking budgets, for an engine whose requests with a budget have no drafts."""
    from vllm.v1.sample.logits_processor.interface import MoveDirectionality
    from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

    class MendedHolder(ThinkingBudgetStateHolder):
        def sync_batch(self, batch_update: Any) -> None:
            if not batch_update:
                return
            super().sync_batch(replace(batch_update, moved=[]))
            for source, target, direction in batch_update.moved:
                moved, displaced = self._state.pop(source, None), self._state.pop(target, None)
                if moved is not None:
                    self._state[target] = moved
                if displaced is not None and direction == MoveDirectionality.SWAP:
                    self._state[source] = displaced

    return MendedHolder(reasoning_config, max_num_reqs, 0, device, False)


def mend(runner: Any) -> None:
    """Give a runner's batch the mended keeper in place of stock's; nothing without reasoning."""
    batch = runner.input_batch
    if batch.thinking_budget_state_holder is not None:
        batch.thinking_budget_state_holder = mended_holder(
            runner.vllm_config.reasoning_config, runner.max_num_reqs, runner.device
        )


PATCH = Patch(
    name="thinking_budgets",
    why="A request that moves into the place of a finished one inherits its thinking budget, so vLLM forces the end "
    "of reasoning on requests that have no budget, also without speculation. With speculation it looks for a "
    "request's logits where a chain of drafts would put them.",
    how="Our runner's batch gets a subclass of ThinkingBudgetStateHolder whose sync_batch drops what was in the place, "
    "made for no drafts.",
    versions="0.32",
    retired_by="vLLM clears the place (tests/unit/test_thinking_budgets.py notices)",
    surfaces=(
        Surface(
            _HOLDER,
            "ThinkingBudgetStateHolder",
            (
                "reasoning_config",
                "max_num_seqs",
                "num_spec_tokens",
                "device",
                "is_pin_memory",
            ),
        ),
        Surface(_HOLDER, "ThinkingBudgetStateHolder.sync_batch", ("batch_update",)),
        Surface("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.initialize_kv_cache"),
    ),
)
