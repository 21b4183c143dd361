# SPDX-License-Identifier: Apache-2.0
"""What an engine says at start: speculation must never be silently off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

if TYPE_CHECKING:
    import torch

    from vllm_hidden_transfer.engine.settings import Settings

logger = init_logger("vllm.hidden_transfer")

MISMATCH_BANNER = """
********************************************************************************
hidden_transfer: %s.
allow_target_mismatch is set, so it drafts all the same. The output stays exact;
expect fewer accepted drafts until maps are trained for this very target.
********************************************************************************"""

UNUSABLE_DRAFTS = (
    "hidden_transfer: the draft pass gave NaN or infinite logits; those drafts are dropped and the "
    "output stays exact, but expect fewer accepted drafts. This is said once."
)


DOES_NOT_PAY = (
    "hidden_transfer: a draft pass does not pay here for %d requests at a time, so steps go without one until it does; "
    "always_draft in --speculative-config drafts all the same. This is said once."
)


def announce(
    settings: Settings,
    drafts: str,
    budget: int,
    dtype: torch.dtype,
    attention: str,
    runner: str,
    *,
    adaptive: bool,
) -> None:
    """Say what runs, once an engine.

    Args:
        drafts: the draft source in a few words.
        budget: nodes of a tree at most.
        attention: how trees are attended, in a few words.
        runner: "V1" or "V2".
        adaptive: whether steps go without drafts where those do not pay.
    """
    if get_tensor_model_parallel_rank() != 0:
        return
    logger.info(
        "hidden_transfer is on: %s, trees of up to %d nodes %s, %s, %s, %s runner",
        drafts,
        budget,
        "where they pay" if adaptive else "at every step",
        str(dtype).removeprefix("torch."),
        attention,
        runner,
    )
    if settings.mismatch is not None:
        logger.warning(MISMATCH_BANNER, settings.mismatch)
