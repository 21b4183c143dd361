# SPDX-License-Identifier: Apache-2.0
"""vLLM's lines about the method that ours is translated into, which its user did not choose."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from vllm_hidden_transfer.patches.base import Patch, Surface

UNFIT: Mapping[str, str] = {
    "vllm.config.speculative": "Using a custom class-based proposer backend.",
    "vllm.config.vllm": "max_num_scheduled_tokens is set to",
    "vllm.v1.spec_decode.custom_class_proposer": "Loaded custom proposer class ",
}
"""By logger, how a line begins that is not true of our method: that a proposer interface is experimental, that drafts
take tokens off the scheduler's budget, that a class was loaded which proposes nothing."""


@contextmanager
def left_out() -> Iterator[None]:
    """Leave those lines out while this lasts. A line that vLLM words otherwise is shown."""
    with ExitStack() as stack:
        for name, beginning in UNFIT.items():
            logger = logging.getLogger(name)
            keep = _keep_all_but(beginning)
            logger.addFilter(keep)
            stack.callback(logger.removeFilter, keep)
        yield


def _keep_all_but(beginning: str) -> logging.Filter:
    class Keep(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return not str(record.msg).startswith(beginning)

    return Keep()


PATCH = Patch(
    name="log_lines",
    why="Our method is custom_class to vLLM's V1 runner. Its warnings about that class name things that a user of "
    "hidden_transfer cannot know or change, and do not hold for it.",
    how="Filters three exact lines of three loggers while a configuration of ours is made, and while our worker makes "
    "its runner. One line of our own says what stands for our method in vLLM's lines.",
    versions="0.32",
    retired_by="a registry of speculative methods in vLLM",
    surfaces=(
        Surface("vllm.config.speculative", "logger"),
        Surface("vllm.config.vllm", "logger"),
        Surface("vllm.v1.spec_decode.custom_class_proposer", "logger"),
    ),
)
