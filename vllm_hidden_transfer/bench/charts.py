# SPDX-License-Identifier: Apache-2.0
"""Per-depth acceptance as a small bar chart, in the terminal and as a PNG."""

from collections.abc import Sequence
from pathlib import Path

from rich.bar import Bar
from rich.table import Table


def per_depth_table(rates: Sequence[float], width: int = 40) -> Table:
    """One bar a depth; `rates` are shares between 0 and 1, depth 1 first."""
    table = Table.grid(padding=(0, 1))
    for depth, rate in enumerate(rates, start=1):
        table.add_row(f"depth {depth}", Bar(1.0, 0.0, rate, width=width), f"{rate:4.0%}")
    return table


def per_depth_png(rates: Sequence[float], title: str, path: Path) -> None:
    """The same chart as a picture, for a page or a report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 3.0), layout="constrained")
    axes = figure.add_subplot()
    depths = range(1, len(rates) + 1)
    bars = axes.bar(depths, [100 * rate for rate in rates], width=0.6, color="#4063d8")
    axes.bar_label(bars, fmt="%.0f%%", padding=2)
    axes.set_xticks(list(depths))
    axes.set_xlabel("depth of the draft tree")
    axes.set_ylabel("accepted, % of decode passes")
    axes.set_xlim(0.4, len(rates) + 0.6)
    axes.set_ylim(0, 105)
    axes.set_title(title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
