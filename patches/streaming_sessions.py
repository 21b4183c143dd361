# SPDX-License-Identifier: Apache-2.0
"""Prompts in pieces (``StreamingInput``): a session goes on behind an answer's end, not behind the accepted path."""

from __future__ import annotations

from typing import Any

from vllm_hidden_transfer.asking import is_ours
from vllm_hidden_transfer.patches.base import Patch, Surface

_SCHEDULER = "vllm.v1.core.sched.scheduler"

SURFACES_IN_ENGINES = (
    Surface(_SCHEDULER, "Scheduler._handle_stopped_request", ("request",)),
    Surface(_SCHEDULER, "Scheduler._update_request_as_session", ("session", "update")),
    Surface(_SCHEDULER, "Scheduler.update_draft_token_ids", ("draft_token_ids",)),
)
"""What ``mend`` builds on, apart because the scheduler is too heavy to import at every start."""


def _install() -> None:
    from vllm.config import SchedulerConfig

    stock = SchedulerConfig.get_scheduler_cls
    mended = False

    def get_scheduler_cls(self: Any) -> Any:
        from vllm.v1.core.sched.scheduler import Scheduler

        nonlocal mended
        if not mended:
            mend(Scheduler)
            mended = True
        return stock(self)

    SchedulerConfig.get_scheduler_cls = get_scheduler_cls


def mend(scheduler: Any) -> None:
    """Wrap two methods of vLLM's scheduler class. They stay stock's for engines without our method."""
    stock_stopped = scheduler._handle_stopped_request
    stock_drafts = scheduler.update_draft_token_ids

    def _handle_stopped_request(self: Any, request: Any) -> bool:
        if request.resumable and is_ours(self.vllm_config.speculative_config):
            # Without speculation all tokens but the last are computed when an answer ends.
            computed = request.num_tokens - 1 + request.num_output_placeholders
            request.num_computed_tokens = min(request.num_computed_tokens, computed)
        return bool(stock_stopped(self, request))

    def update_draft_token_ids(self: Any, draft_token_ids: Any) -> None:
        stock_drafts(self, draft_token_ids)
        if not is_ours(self.vllm_config.speculative_config):
            return
        for request_id in draft_token_ids.req_ids:
            request = self.requests.get(request_id)
            if request is not None and request.resumable and _is_seeded(request):
                # A path behind the end would have drawn from the generator that the next answer goes on with.
                request.spec_token_ids = []

    scheduler._handle_stopped_request = _handle_stopped_request
    scheduler.update_draft_token_ids = update_draft_token_ids


def _is_seeded(request: Any) -> bool:
    return request.sampling_params is not None and request.sampling_params.seed is not None


PATCH = Patch(
    name="streaming_sessions",
    why="Where an answer's end falls inside an accepted path, vLLM counts the whole path as computed, and a session "
    "goes on from there: tokens behind the end stay in the cache in place of the next piece's, and all later answers "
    "differ, with every kind of speculation.",
    how="Wraps SchedulerConfig.get_scheduler_cls, which every engine core asks once, to wrap two methods of Scheduler "
    "there: _handle_stopped_request first cuts num_computed_tokens to what is computed without speculation, and "
    "update_draft_token_ids gives seeded sessions no drafts, because draws behind an end cannot be taken back. Engines "
    "without our method pass through.",
    versions="0.32",
    retired_by="tests/engine/test_streaming_sessions.py::test_stock_counts_a_path_behind_the_end fails because "
    "upstream has mended it; the seeded part stays until draws can be taken back",
    surfaces=(Surface("vllm.config", "SchedulerConfig.get_scheduler_cls"),),
    install=_install,
)
