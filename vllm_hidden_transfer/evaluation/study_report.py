# SPDX-License-Identifier: Apache-2.0
"""A study for people: tables in the terminal and in ``eval.md``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.table import Table

from vllm_hidden_transfer.evaluation.study_result import STUDY_FILE, Group, Length, Study


@dataclass(frozen=True)
class Grid:
    """A table of text, however it will be shown; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, title_justify="left")
        for number, name in enumerate(self.header):
            table.add_column(name, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a page."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def study_grids(study: Study) -> list[Grid]:
    """All tables of a study."""
    return [_lengths(study), _depths(study)]


def _lengths(study: Study) -> Grid:
    def row(name: str, pick: Callable[[Group], Length | None]) -> list[str]:
        return [name, *(_cell(pick(group)) for group in study.groups)]

    sizes = [budget.nodes for budget in study.groups[0].budgets]
    kinds = sorted({kind for group in study.groups for kind in group.kinds})
    usual = study.node_budget
    rows = [
        ["answers", *(str(group.answers) for group in study.groups)],
        ["repeated 4-grams", *(f"{group.chain.repeated:.0%}" for group in study.groups)],
        row(f"chain of {study.num_transfer_steps}", lambda group: group.chain),
    ]
    for nodes in sizes:
        name = f"tree of {nodes}" + (" (default)" if nodes == usual else "")
        rows.append(row(name, lambda group, nodes=nodes: group.at(nodes)))  # type: ignore[misc]
    rows.append(row(f"tree of {usual}, first {study.opening_tokens} tokens", lambda g: g.opening))
    rows.append(row(f"tree of {usual}, after them", lambda group: group.rest))
    for kind in kinds:
        rows.append(
            row(f"tree of {usual}, {kind}", lambda group, kind=kind: group.kinds.get(kind))  # type: ignore[misc]
        )
    return Grid(
        "acceptance length: output tokens after the first per decode pass (95% interval)",
        ["", *(group.name for group in study.groups)],
        rows,
    )


def _cell(length: Length | None) -> str:
    return "-" if length is None else str(length)


def _depths(study: Study) -> Grid:
    rows = [
        [
            f"{group.name}, depth {depth}",
            *(f"{share:.1%}" for share in (found.top1, found.top5, found.top10, found.reached)),
            f"{found.uncalibrated_loss:.3f} / {found.loss:.3f}",
            f"{found.uncalibrated_error:.2%} / {found.error:.2%}",
        ]
        for group in study.groups
        for depth, found in enumerate(group.depths, start=1)
    ]
    header = ["", "top 1", "top 5", "top 10", "reached", "-log p", "calibration error"]
    return Grid(
        "drafts by depth (-log p and calibration error: without / with the checkpoint's temperatures)",
        header,
        rows,
    )


def study_markdown(study: Study, pictures: list[str]) -> str:
    """The content of ``eval.md``; `pictures` are file names beside it."""
    source = study.provenance
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    seen = {"none": "published form", "token": "token-conditioned, one pass", "chained": "chained"}
    fit = "" if source.trained_for_this_target else ", **trained for other weights than these**"
    grids = "\n\n".join(grid.markdown() for grid in study_grids(study))
    images = "\n".join(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures)
    return f"""# Acceptance study of {source.checkpoint} on {source.target}

`{source.command}`

Maps: {seen.get(study.conditioning, study.conditioning)}, k = {study.num_transfer_steps},
transfer layer {study.transfer_layer}, temperatures {", ".join(f"{t:g}" for t in study.temperatures)},
default tree of {study.node_budget} nodes{fit}.

{grids}

Recorded answers, at most {study.max_tokens} output tokens of each, walked as a decode would: a draft
is accepted where it equals the answer's token. "Repeated 4-grams" is the share that the same answer
had before. "top n": the token that came is among the n most probable drafts of that depth (of chained
maps: after the tokens that came before it). "reached": decode passes with trees of {study.node_budget}
nodes whose accepted path is that long. Calibration error: |claimed - right| over the ten most probable
drafts of every root, in ten bins.

{images}

Machine: {source.machine}; {versions}.
Target fingerprint `{source.target_fingerprint}`;
maps sha256 `{source.checkpoint_digest}...`; answers sha256 `{source.data_digest}...`.
"""


def read_study(folder: Path) -> Study | None:
    """The study in a folder; None where there is none.

    Raises:
        ValueError: the file is there and cannot be used; the message is one sentence.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        return None
    try:
        return Study.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} is no study of this version ({first}).") from error
