# SPDX-License-Identifier: Apache-2.0
"""Draw docs/results.svg from the committed pages of figures: what a step gives, beside what it costs.

    python scripts/plot_results.py

Tokens a pass come from benchmarks/acceptance.md, costs from the last run of 16 nodes and of the draft pass in
benchmarks/step_cost.md. No figure is in this file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import matplotlib.axes

ROOT = Path(__file__).resolve().parents[1]
ACCEPTANCE = ROOT / "benchmarks" / "acceptance.md"
STEP_COST = ROOT / "benchmarks" / "step_cost.md"
PICTURE = ROOT / "docs" / "results.svg"

TREE, DRAFT_PASS = "our bushy tree 16", "draft pass"
MAPS = ("token-conditioned, one pass", "as published, one pass")
DECODING = ("greedy", "temperature 0.8")
REQUESTS = (1, 8)
_INTERVAL = r"([\d.]+) \(([\d.]+) to ([\d.]+)\)"
WIN, LOSS, DRAFT = "#4063d8", "#c4472f", "#9a9a9a"


@dataclass(frozen=True)
class Measured:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, groups: tuple[str, ...]) -> Measured:
        return cls(*map(float, groups))

    def error(self) -> tuple[list[float], list[float]]:
        """What matplotlib wants of one bar."""
        return [self.value - self.low], [self.high - self.value]


def acceptance(page: str) -> dict[tuple[str, str], Measured]:
    """Tokens a pass, by maps and decoding."""
    found = re.findall(rf"^\| (.+?) \| (.+?) \| {_INTERVAL} \|", page, re.M)
    return {(maps, decoding): Measured.of(rest) for maps, decoding, *rest in found}


def costs(page: str) -> dict[tuple[str, int], Measured]:
    """Plain steps that a step costs, by its name and the number of requests; of several runs the last."""
    found: dict[tuple[str, int], Measured] = {}
    requests = 0
    for line in page.splitlines():
        if heading := re.match(r" +(\d+) request\(s\)", line):
            requests = int(heading[1])
        elif row := re.match(rf"│ (.+?) +│ [\d.]+ +│ {_INTERVAL}", line):
            found[row[1], requests] = Measured.of(row.groups()[1:])
    return found


def draw(path: Path = PICTURE) -> None:
    """Write the picture; the same figures give the same file with the same matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    gives, takes = acceptance(ACCEPTANCE.read_text()), costs(STEP_COST.read_text())
    settings = {"svg.fonttype": "none", "svg.hashsalt": "results", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_gives(left, gives)
        _draw_costs(right, gives, takes)
        figure.suptitle("SmolLM2-135M-Instruct, trees of 16 nodes, fp32, Xeon 2.80 GHz, 2 cores")
        figure.savefig(path, metadata={"Date": None})


def _draw_gives(axes: matplotlib.axes.Axes, gives: dict[tuple[str, str], Measured]) -> None:
    names = [(maps, decoding) for maps in MAPS for decoding in DECODING]
    for place, name in enumerate(names):
        value = gives[name]
        axes.bar(place, value.value, yerr=value.error(), width=0.65, color=WIN, capsize=3)
        axes.text(place, value.high + 0.08, f"{value.value:.2f}", ha="center")
    labels = [f"{maps.split(',')[0]}\n{decoding}".replace("-", "-\n") for maps, decoding in names]
    axes.set_xticks(range(len(names)), labels, fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.text(len(names) - 0.55, 1.05, "no\nspeculation", fontsize=7)
    axes.set_xlim(-0.5, len(names) + 0.3)
    axes.set_ylim(0, 5.4)
    axes.set_ylabel("tokens a pass")
    axes.set_title("What a step gives")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_costs(
    axes: matplotlib.axes.Axes,
    gives: dict[tuple[str, str], Measured],
    takes: dict[tuple[str, int], Measured],
) -> None:
    worth = [gives[MAPS[0], decoding].value for decoding in DECODING]
    labels = []
    for place, requests in enumerate(REQUESTS):
        tree, draft = takes[TREE, requests], takes[DRAFT_PASS, requests]
        whole = tree.value + draft.value
        outcome = "wins" if whole < min(worth) else "loses" if whole > max(worth) else "either"
        axes.bar(place, tree.value, width=0.5, color=LOSS if outcome == "loses" else WIN)
        axes.bar(place, draft.value, bottom=tree.value, width=0.5, color=DRAFT)
        axes.text(place, tree.value / 2, f"verify {tree.value:.2f}", ha="center", color="white")
        axes.text(place, tree.value + draft.value / 2, f"draft {draft.value:.2f}", ha="center")
        labels.append(f"requests at a time: {requests}\n{whole:.2f}: {outcome}")
    for value, decoding, style in zip(worth, DECODING, ("--", ":"), strict=True):
        axes.axhline(value, color="black", linewidth=0.9, linestyle=style)
        axes.text(0.5, value + 0.05, f"gives {value:.2f}, {decoding}", ha="center", fontsize=7)
    axes.set_xticks(range(len(REQUESTS)), labels)
    axes.set_ylim(0, 5.4)
    axes.set_ylabel("plain steps that a step costs")
    axes.set_title("What a step costs")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    draw()
