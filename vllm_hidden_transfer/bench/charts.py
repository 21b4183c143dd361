# SPDX-License-Identifier: Apache-2.0
"""Per-depth acceptance as a small bar chart, in the terminal and as a PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def ratios_png(cells: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Ratio to no speculation against the requests at a time, a line a method, a panel a kind of prompts and
    temperature; bars are 95% intervals. `cells` are those of `compare`."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((cell["kind"], cell["temperature"]) for cell in cells))
    figure = Figure(figsize=(5.0 * max(len(panels), 1), 3.5), layout="constrained")
    for place, (kind, temperature) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        chosen = [
            cell for cell in cells if (cell["kind"], cell["temperature"]) == (kind, temperature)
        ]
        first, *sides = chosen[0]["sides"]
        requests = [cell["requests"] for cell in chosen]
        for shift, name in enumerate(sides):
            found = [cell["sides"][name] for cell in chosen]
            below = [side["ratio"] - side["low"] for side in found]
            above = [side["high"] - side["ratio"] for side in found]
            # Side by side, lest intervals hide each other.
            places = [count * 1.04 ** (shift - (len(sides) - 1) / 2) for count in requests]
            ratios = [side["ratio"] for side in found]
            axes.errorbar(places, ratios, (below, above), marker="o", capsize=3, label=name)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(requests, [str(count) for count in requests])
        axes.set_xlabel("requests at a time")
        axes.set_ylabel(f"tokens/s, ratio to {first}")
        axes.set_title(f"{kind} prompts, temperature {temperature:g}", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
