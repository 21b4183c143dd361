# SPDX-License-Identifier: Apache-2.0
"""The comparison for people and for programs: ``rivals.md`` and ``rivals.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.rivals.compare import (
    BUDGETS,
    Judgement,
    Sweep,
    Training,
    Trial,
    describe,
    kept,
)
from benchmarks.rivals.contestants import CONTESTANTS
from vllm_hidden_transfer.checkpoint.maps import write_atomically
from vllm_hidden_transfer.evaluation.study_report import Grid
from vllm_hidden_transfer.evaluation.study_result import Group, Length

Row = tuple[str, Training, Judgement]


def finished(folder: Path) -> dict[str, tuple[Training, Judgement]]:
    """Drafters that are trained and judged."""
    found = {}
    for name in CONTESTANTS:
        training = kept(folder / name / "training.json", Training)
        judgement = kept(folder / name / "judgement.json", Judgement)
        if training and judgement:
            found[name] = training, judgement
    return found


def trials_of(folder: Path, name: str) -> Sweep:
    """What the sweep of a drafter tried."""
    paths = sorted((folder / name / "sweep").glob("*/trial.json"))
    return Sweep(trials=[trial for path in paths if (trial := kept(path, Trial))])


def write_report(folder: Path, output: Path) -> list[Grid]:
    """Write both files from what is finished in `folder`; returns the tables."""
    found = finished(folder)
    rows = [(CONTESTANTS[name].title, *parts) for name, parts in found.items()]
    sweeps = {name: trials_of(folder, name) for name in found}
    grids = [_lengths(rows), _trainings(rows), _costs(rows), _sweeps(sweeps)]
    record = {
        name: {
            "title": CONTESTANTS[name].title,
            "training": training.model_dump(),
            "judgement": judgement.model_dump(),
            "sweep": sweeps[name].model_dump()["trials"],
        }
        for name, (training, judgement) in found.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "rivals.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(output / "rivals.md", _page(grids, rows).encode())
    return grids


def _by_group(judgement: Judgement, show: Callable[[Group], str]) -> str:
    return " / ".join(show(group) for group in judgement.groups)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _percent(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.0%}" for value in values)


def _lengths(rows: Sequence[Row]) -> Grid:
    shapes: dict[str, Callable[[Group], Length]] = {"chain of k": lambda group: group.chain}
    for nodes in BUDGETS:
        shapes[f"tree of {nodes}"] = partial(Group.at, nodes=nodes)
    names = " / ".join(group.name for group in rows[0][2].groups) if rows else ""
    lines = []
    for title, training, judgement in rows:
        trial = training.trial
        cells = [
            " / ".join(str(pick(group)) for group in judgement.groups) for pick in shapes.values()
        ]
        lines.append(
            [
                title,
                f"{training.parameters / 1e6:.2f}M",
                trial.choice.start,
                f"{trial.minutes:.1f}",
                f"{trial.choice.learning_rate:g}",
                str(trial.plan.steps),
                _numbers(trial.kl),
                _by_group(judgement, lambda group: _percent(depth.top1 for depth in group.depths)),
                *cells,
            ]
        )
    return Grid(
        f"acceptance length, {names}: output tokens after the first per decode pass (95% interval)",
        [
            "drafter",
            "trained parameters",
            "start",
            "minutes",
            "learning rate",
            "steps",
            "held-out KL by depth",
            "top 1 by depth",
            *shapes,
        ],
        lines,
    )


def _trainings(rows: Sequence[Row]) -> Grid:
    return Grid(
        "trainings",
        ["drafter", "settings chosen by the sweep", "seconds a step", "start, s", "temperatures"],
        [
            [
                title,
                describe(training.trial.choice),
                f"{training.trial.plan.seconds_per_step:.2f}",
                f"{training.trial.plan.start_seconds:.0f}",
                _numbers(judgement.temperatures),
            ]
            for title, training, judgement in rows
        ],
    )


def _costs(rows: Sequence[Row]) -> Grid:
    def worth(training: Training, judgement: Judgement) -> str:
        cost = 1 + training.draft_share
        return _by_group(judgement, lambda group: f"{group.at(BUDGETS[1]).length / cost:.2f}")

    return Grid(
        "what drafting costs",
        [
            "drafter",
            "weights read to draft k tokens, share of a target pass",
            f"tree of {BUDGETS[1]}: tokens per target pass's worth of weights read",
        ],
        [
            [title, f"{training.draft_share:.0%}", worth(training, judgement)]
            for title, training, judgement in rows
        ],
    )


def _sweeps(sweeps: dict[str, Sweep]) -> Grid:
    return Grid(
        "sweeps: what was tried, by held-out KL",
        ["drafter", "settings", "minutes", "steps", "KL by depth", "weighted"],
        [
            [
                CONTESTANTS[name].title,
                describe(trial.choice) + (" (chosen)" if trial == sweep.best else ""),
                f"{trial.minutes:.1f}",
                str(trial.plan.steps),
                _numbers(trial.kl),
                f"{trial.loss:.3f}",
            ]
            for name, sweep in sweeps.items()
            for trial in sweep.trials
        ],
    )


def _page(grids: Sequence[Grid], rows: Sequence[Row]) -> str:
    tables = "\n\n".join(grid.markdown() for grid in grids)
    origins = {training.origin for _, training, _ in rows}
    origins |= {judgement.origin for _, _, judgement in rows}
    sources = "\n".join(
        f"- `{origin.command}` on {origin.machine}, threads: {origin.threads}, commit {origin.commit}"
        for origin in sorted(origins, key=lambda origin: origin.command)
    )
    repeated = ""
    if rows:
        groups = rows[0][2].groups
        repeated = "; ".join(
            f"{group.name}: {group.answers} answers, {group.chain.repeated:.0%} repeated 4-grams"
            for group in groups
        )
    compared = [row[0] for row in rows]
    missing = [each.title for each in CONTESTANTS.values() if each.title not in compared]
    absent = f"Not run to the end yet: {'; '.join(missing)}.\n\n" if missing else ""
    return f"""# Transfer maps beside Medusa heads and an EAGLE-style layer

{absent}{tables}

Judged answers: {repeated}. They are the target's own, at most 96 tokens of each, to prompts that nobody was trained
or calibrated on. "Top 1 by depth" of chained maps and of the EAGLE-style layer is given the tokens that came before.

All drafters were trained by the same trainer with the same sequences and roots a step, the KL to the target's own
distribution with weights 0.8 per depth, the same sampled vocabulary, AdamW and cosine. As many steps as fit into the
same minutes of processor time were planned from eleven of them, so cheaper steps make more of them; the table has the
minutes that it took, start included. Preparing the data (the target's states over the corpus, which every drafter
reads from disk) is not counted. The learning rates were chosen on held-out rows, the temperatures fitted on held-out
answers, and all weights rounded to bf16 before they were judged.

Medusa heads (arXiv 2401.10774) draft from the last processed token alone and start at zero, as published, with the
target's LM head for all. The EAGLE-style layer (arXiv 2401.15077) is one decoder layer of the target's kind that starts
as a copy of its last one; with the start "ridge" its fc is fitted in closed form, as our maps are. It learns on its own
predicted features over k steps (HASS, arXiv 2408.15766). Chained maps and the EAGLE-style layer expand the 8 most
probable nodes of a level, each on its own path.

Our one-pass maps stand here as transfer maps alone: the bigram re-weighting that the shipped ones carry comes on top.

What drafting costs counts weights only: Medusa heads read the LM head once for all heads, one-pass maps read the upper
layers and the LM head once, chained maps and the EAGLE-style layer read theirs k times. The keys and values that they
read, the verification's own rows and the launch of k passes come on top.

{sources}
"""
