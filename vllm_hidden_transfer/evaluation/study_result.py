# SPDX-License-Identifier: Apache-2.0
"""What an acceptance study found: the content of ``eval.json``. Imports neither torch nor vLLM."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

STUDY_VERSION: Final = 1
STUDY_FILE = "eval.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Length(_Part):
    """Acceptance length: output tokens after the first, per decode pass, summed over answers."""

    length: float
    low: float | None
    high: float | None
    """95% bootstrap interval over answers; None for a single answer."""
    answers: int
    passes: int
    repeated: float
    """Share of 4-grams that the same text already had: loops flatter every drafter."""

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.length:.2f}"
        return f"{self.length:.2f} ({self.low:.2f} to {self.high:.2f})"


class Budget(_Part):
    """Acceptance length with trees of one size."""

    nodes: int
    found: Length


class CalibrationBin(_Part):
    """Candidates that claim similar probabilities."""

    nodes: int
    claimed: float
    """Mean probability that they claim."""
    right: float
    """Share that was right."""


class Depth(_Part):
    """What the drafts of one depth are worth."""

    roots: int
    top1: float
    top5: float
    top10: float
    """Share of the roots whose most probable 1, 5 or 10 drafts hold the token that came."""
    reached: float
    """Share of the decode passes, with trees of the default size, whose accepted path is this long."""
    loss: float
    """Mean of -log p(the token that came), in nats, with the checkpoint's temperatures."""
    uncalibrated_loss: float
    """The same without temperatures."""
    error: float
    """Expected calibration error over the ten most probable drafts, with the checkpoint's temperatures."""
    uncalibrated_error: float
    bins: list[CalibrationBin]
    uncalibrated_bins: list[CalibrationBin]


class Group(_Part):
    """Answers that were written in one way: greedily, at one temperature, or not by the target at all."""

    name: str
    temperature: float | None
    """None for text that the target did not write."""
    answers: int
    output_tokens: int
    depths: list[Depth]
    chain: Length
    """One draft a depth: the most probable one after the one before."""
    budgets: list[Budget]
    """Most probable paths."""
    opening: Length | None
    """Decode passes that start within the first `Study.opening_tokens`; default tree size."""
    rest: Length | None
    kinds: dict[str, Length]
    """By kind of prompt; default tree size."""

    def at(self, nodes: int) -> Length:
        """Acceptance length with trees of one size."""
        return next(budget.found for budget in self.budgets if budget.nodes == nodes)


class Provenance(_Part):
    """Where the figures come from."""

    command: str
    machine: str
    versions: dict[str, str]
    target: str
    target_fingerprint: str
    checkpoint: str
    checkpoint_digest: str
    """sha256 of the maps' weights, its first 16 digits."""
    trained_for_this_target: bool
    data_digest: str
    """sha256 over the token ids of the judged answers, its first 16 digits."""


class Study(_Part):
    """The whole of ``eval.json``."""

    format_version: Literal[1] = STUDY_VERSION
    provenance: Provenance
    conditioning: str
    num_transfer_steps: int
    transfer_layer: int
    temperatures: list[float]
    node_budget: int
    """The checkpoint's default tree size."""
    draft_vocabulary: int | None = None
    """Tokens on the list that drafts were taken from, beside each text's own; None where they were taken from all."""
    max_tokens: int
    """Output tokens that an answer was judged on at most."""
    opening_tokens: int
    groups: list[Group]
