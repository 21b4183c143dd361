# SPDX-License-Identifier: Apache-2.0
"""A study as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vllm_hidden_transfer.evaluation.study_result import CalibrationBin, Length, Study

COLOURS = ("#4063d8", "#cb3c33", "#389826", "#9558b2", "#8a6d3b", "#3b8a8a")


def draw_study(study: Study, folder: Path) -> list[str]:
    """Write all pictures into `folder`; returns their file names."""
    pictures: dict[str, Callable[[Study], Figure]] = {
        "acceptance_by_budget.png": by_budget,
        "acceptance_by_depth.png": by_depth,
        "reliability.png": reliability_diagram,
    }
    for name, draw in pictures.items():
        draw(study).savefig(folder / name, dpi=130)
    return list(pictures)


def by_budget(study: Study) -> Figure:
    """Acceptance length against the nodes of a tree, with intervals; a cross marks the chain."""
    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for group, colour in zip(study.groups, _colours(study), strict=True):
        nodes = [budget.nodes for budget in group.budgets]
        found = [budget.found for budget in group.budgets]
        axes.errorbar(
            nodes,
            [length.length for length in found],
            yerr=_bars(found),
            color=colour,
            marker="o",
            markersize=4,
            capsize=3,
            label=group.name,
        )
        axes.plot([study.num_transfer_steps], [group.chain.length], "x", color=colour)
    axes.set_xscale("log", base=2)
    ticks = [budget.nodes for budget in study.groups[0].budgets]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("nodes of the tree (x: chain)")
    axes.set_ylabel("tokens per decode pass")
    axes.set_ylim(bottom=1.0)
    axes.grid(alpha=0.3)
    _finish(axes)
    return figure


def _bars(lengths: Sequence[Length]) -> list[list[float]]:
    below = [length.length - (length.low or length.length) for length in lengths]
    above = [(length.high or length.length) - length.length for length in lengths]
    # A percentile interval of very few answers may lie beside its estimate.
    return [[max(part, 0.0) for part in side] for side in (below, above)]


def by_depth(study: Study) -> Figure:
    """Share of decode passes whose accepted path reaches each depth, one bar for each kind of answers."""
    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(study.groups)
    depths = range(1, study.num_transfer_steps + 1)
    for number, (group, colour) in enumerate(zip(study.groups, _colours(study), strict=True)):
        left = [depth + (number - (len(study.groups) - 1) / 2) * width for depth in depths]
        shares = [100 * depth.reached for depth in group.depths]
        bars = axes.bar(left, shares, width=width * 0.92, color=colour, label=group.name)
        axes.bar_label(bars, fmt="%.0f", padding=1, fontsize="x-small")
    axes.set_xticks(list(depths))
    axes.set_xlabel("depth")
    axes.set_ylabel(f"accepted, % of passes, {study.node_budget} nodes")
    axes.set_ylim(0, 108)
    _finish(axes)
    return figure


def reliability_diagram(study: Study) -> Figure:
    """Claimed probability against the share that was right; dashed without temperatures."""
    columns = study.num_transfer_steps
    figure = Figure(figsize=(2.6 * columns + 0.6, 3.2), layout="constrained")
    panels = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for depth, axes in enumerate(panels):
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
        for group, colour in zip(study.groups, _colours(study), strict=True):
            found = group.depths[depth]
            _curve(axes, found.bins, color=colour, marker=".", label=group.name)
            _curve(axes, found.uncalibrated_bins, color=colour, linestyle=":", alpha=0.7)
        axes.set_title(f"depth {depth + 1}", fontsize="medium")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
    panels[0].set_ylabel("share that was right")
    figure.supxlabel("claimed probability (dotted: without temperatures)", fontsize="medium")
    _finish(panels[-1])
    return figure


def _curve(axes: Any, bins: Sequence[CalibrationBin], **style: Any) -> None:
    # A bin of a handful of nodes says nothing and draws the eye.
    kept = [item for item in bins if item.nodes >= 20]
    axes.plot([item.claimed for item in kept], [item.right for item in kept], **style)


def _colours(study: Study) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(study.groups))]


def _finish(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False)
