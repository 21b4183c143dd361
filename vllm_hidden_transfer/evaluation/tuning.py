# SPDX-License-Identifier: Apache-2.0
"""Fit a checkpoint's temperatures, choose its tree size, and write both into its config.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from vllm_hidden_transfer.checkpoint.config import TransferConfig
from vllm_hidden_transfer.checkpoint.maps import CONFIG_FILE, write_atomically
from vllm_hidden_transfer.drafting.lookup import SHARES
from vllm_hidden_transfer.evaluation.calibration import (
    calibration_error,
    fit_temperatures,
    negative_log_likelihood,
    reliability,
)
from vllm_hidden_transfer.evaluation.drafts import Drafts
from vllm_hidden_transfer.evaluation.preparation import JudgingError, Prepared
from vllm_hidden_transfer.evaluation.study import draft_with_maps, maps_drafter, measured
from vllm_hidden_transfer.evaluation.study_report import Grid
from vllm_hidden_transfer.evaluation.study_result import Length
from vllm_hidden_transfer.evaluation.walks import walk

BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class StepCosts:
    """What a step with drafts costs beyond a decode step of one row without any, as shares of that step."""

    row: float
    """One more verified row."""
    draft: float
    """One draft pass."""

    def step(self, nodes: int) -> float:
        """A whole step with a tree of so many nodes."""
        return 1.0 + self.draft + self.row * nodes


@dataclass(frozen=True)
class Quality:
    """What some settings are worth on answers that they were not fitted on."""

    temperatures: list[float]
    node_budget: int
    losses: list[float]
    """Mean of -log p(the token that came) at each depth, in nats."""
    errors: list[float]
    """Expected calibration error at each depth."""
    length: Length


@dataclass(frozen=True)
class Choice:
    """One tree size, on the answers that the choice is made on."""

    nodes: int
    length: float
    worth: float
    """Expected tokens per unit of cost; 1 is no speculation."""


@dataclass(frozen=True)
class Tuned:
    """The settings of a checkpoint before and after."""

    before: Quality
    after: Quality
    choices: list[Choice]
    """Empty where no costs were given."""


def tune(prepared: Prepared, costs: StepCosts | None, progress: Progress) -> Tuned:
    """Fit on every second answer of each group, judge on the others.

    Raises:
        JudgingError: there are too few answers for two halves.
    """
    fit_on, judge_on = _halves(
        draft_with_maps(
            prepared.target,
            prepared.prefixes,
            prepared.maps,
            prepared.answers,
            progress,
            prepared.vocabulary,
        )
    )
    config = prepared.config
    temperatures = fit_temperatures(fit_on)
    budget = config.tree.node_budget
    choices: list[Choice] = []
    if costs is not None:
        choices = _choices(prepared, fit_on, temperatures, costs, progress)
        budget = max(choices, key=lambda choice: choice.worth).nodes
    settings = (
        (list(config.calibration.temperatures), config.tree.node_budget),
        (temperatures, budget),
    )
    before, after = (
        _quality(prepared, judge_on, *setting)
        for setting in progress.track(settings, description="judging")
    )
    return Tuned(before, after, choices)


def _halves(drafts: Sequence[Drafts]) -> tuple[list[Drafts], list[Drafts]]:
    """Every second answer of each temperature, and the rest."""
    seen: dict[float | None, int] = {}
    halves: tuple[list[Drafts], list[Drafts]] = ([], [])
    for item in drafts:
        temperature = item.answer.example.temperature
        number = seen[temperature] = seen.get(temperature, -1) + 1
        halves[number % 2].append(item)
    if not halves[1]:
        raise JudgingError("One half of the answers is fitted on and one is judged on: give more.")
    return halves


def _lengths(
    prepared: Prepared,
    drafts: Sequence[Drafts],
    temperatures: Sequence[float],
    budgets: Iterable[int],
) -> list[Length]:
    drafter = maps_drafter(
        prepared.target,
        prepared.prefixes,
        prepared.maps,
        drafts,
        temperatures,
        prepared.vocabulary,
        SHARES,
    )
    outputs = [item.answer.tokens for item in drafts]
    return [measured(walk(outputs, drafter, budget), outputs) for budget in budgets]


def _choices(
    prepared: Prepared,
    drafts: Sequence[Drafts],
    temperatures: Sequence[float],
    costs: StepCosts,
    progress: Progress,
) -> list[Choice]:
    tried = progress.track(BUDGETS, description="trying tree sizes")
    lengths = _lengths(prepared, drafts, temperatures, tried)
    return [
        Choice(nodes, length.length, length.length / costs.step(nodes))
        for nodes, length in zip(BUDGETS, lengths, strict=True)
    ]


def _quality(
    prepared: Prepared, drafts: Sequence[Drafts], temperatures: list[float], budget: int
) -> Quality:
    (length,) = _lengths(prepared, drafts, temperatures, [budget])
    return Quality(
        temperatures=temperatures,
        node_budget=budget,
        losses=negative_log_likelihood(drafts, temperatures),
        errors=[calibration_error(bins) for bins in reliability(drafts, temperatures)],
        length=length,
    )


def write_settings(checkpoint: Path, config: TransferConfig, quality: Quality) -> None:
    """Put the settings into config.json, all or nothing; every other key stays as it is."""
    path = checkpoint / CONFIG_FILE
    data = json.loads(path.read_text(encoding="utf-8"))
    data["calibration"] = {**data["calibration"], "temperatures": quality.temperatures}
    if quality.node_budget != config.tree.node_budget:
        data["tree"] = {**data.get("tree", {}), "node_budget": quality.node_budget}
    text = json.dumps(data, indent=2) + "\n"
    TransferConfig.model_validate_json(text, strict=True)
    write_atomically(path, text.encode())


def tuning_grids(tuned: Tuned) -> list[Grid]:
    """Before and after, and the tree sizes where costs were given."""
    before, after = tuned.before, tuned.after
    rows = []
    for name, pick, form in (
        ("temperature", lambda quality: quality.temperatures, ".4g"),
        ("-log p", lambda quality: quality.losses, ".4f"),
        ("calibration error", lambda quality: quality.errors, ".3%"),
    ):
        for depth, pair in enumerate(zip(pick(before), pick(after), strict=True), start=1):
            rows.append([f"{name}, depth {depth}", *(f"{value:{form}}" for value in pair)])
    rows.append(["tree size", str(before.node_budget), str(after.node_budget)])
    rows.append(["acceptance length", str(before.length), str(after.length)])
    grids = [Grid("judged on the other half of the answers", ["", "before", "after"], rows)]
    if tuned.choices:
        sizes = [
            [str(choice.nodes), f"{choice.length:.2f}", f"{choice.worth:.3f}"]
            for choice in tuned.choices
        ]
        header = ["nodes", "acceptance length", "tokens per unit of cost"]
        grids.insert(0, Grid("tree sizes (no speculation: 1.000)", header, sizes))
    return grids
