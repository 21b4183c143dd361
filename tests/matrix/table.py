# SPDX-License-Identifier: Apache-2.0
"""The scope table, from what the feature matrix recorded: ``make scope`` after ``make matrix``.

Results go from ``work/matrix/`` into ``benchmarks/feature_matrix.json``, and from there into ``docs/compatibility.md``
between two marks. A case that was declared but not recorded stands there as "not run", one that failed in its last run
as "fails", and each row says which run it was in: a commit on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.matrix.record import DID_NOT_END, FAILS, FOLDER, SKIPPED
from tests.matrix.rows import BY_NAME
from tests.matrix.settings import SETTINGS
from tests.matrix.test_families import REFUSED, WORKING
from tests.matrix.test_refusals import REFUSALS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
RESULTS = ROOT / "benchmarks" / "feature_matrix.json"
BEGIN, END = "<!-- scope table: begin (make scope) -->", "<!-- scope table: end -->"

Case = dict[str, Any]
Found = dict[str, Case]

UNDER_V2 = {
    "greedy, fp32 and bf16, async scheduling on and off": [
        f"greedy-{scheduler}-{dtype}"
        for scheduler in ("async", "sync")
        for dtype in ("float32", "bfloat16")
    ],
    "seeded sampling with penalties, min_p, logprobs, async and sync": [
        "seeded-async",
        "seeded-sync",
    ],
    "preemption, and slots used again, async and sync": ["preemption-async", "preemption-sync"],
    "tensor parallel 2 (mp)": ["tensor_parallel"],
    "hidden-transfer drafts: those of V1, no waiting for the device": ["drafts-cpu"],
}
"""What the tests under V2 record, by the table's row."""

GPU_ADAPTER = {
    "planted trees, 7 and 15 nodes, greedy and seeded, async and sync": [
        f"planted-{scheduler}-{nodes}" for scheduler in ("async", "sync") for nodes in (7, 15)
    ],
    "decode steps replayed from graphs": ["graphs"],
    "hidden-transfer drafts: those of V1, eager and from graphs": ["drafts-gpu", "drafts-graphs"],
    "preemption, and slots used again": ["preemption"],
    "tensor parallel 2 (mp)": ["tensor_parallel"],
    "exact rows (VLLM_BATCH_INVARIANT=1)": ["exact-rows"],
}
"""What the tests of the GPU's adapter record on CPU tensors."""

WITHOUT_MAPS = {
    "prompt lookup": ["lookup"],
    "token recycling": ["recycling"],
    "both": ["recycling and lookup"],
}
"""What tests/engine/test_text_drafts.py records."""

NOT_RUN = "not run"
UNCLAIMED = (FAILS, DID_NOT_END, NOT_RUN, SKIPPED)
"""Outcomes that claim nothing, the worst first."""


def collect(folder: Path = FOLDER) -> Found:
    """What is in ``work/matrix/``, by case: of several tests of one case the worst outcome, then the oldest."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found: Found = {}
    for record in sorted(records, key=lambda record: (_rank(record["outcome"]), record["date"])):
        found.setdefault(f"{record['setting']}-{record['row']}", record)
    return found


def _rank(outcome: str) -> int:
    return UNCLAIMED.index(outcome) if outcome in UNCLAIMED else len(UNCLAIMED)


def _run_of(case: Case) -> tuple[str, str]:
    """Commit and CPU."""
    return case.get("commit", "not recorded"), case.get("cpu", "not recorded")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Cells:
    """What a row of the table says of its cases."""

    outcome: str
    length: str = ""
    """Acceptance length."""
    run: str = ""
    """Number of the run; several where the cases were not run together."""
    sentence: str = ""
    """What a refusal says."""

    def line(self, title: str, note: str = "") -> str:
        """The row."""
        claimed = (
            self.outcome if self.outcome not in (FAILS, DID_NOT_END) else f"**{self.outcome}**"
        )
        return _line(title, claimed, self.length, self.run, note)


class Results:
    """The recorded cases, and the runs they were in: all cases of a commit on a kind of CPU, the newest first."""

    def __init__(self, found: Found) -> None:
        self._found = found
        dates: dict[tuple[str, str], set[str]] = {}
        for case in found.values():
            dates.setdefault(_run_of(case), set()).add(case.get("date", ""))
        self._runs = sorted(dates, key=lambda run: max(dates[run]), reverse=True)
        self._dates = dates

    def runs(self) -> list[str]:
        """A line for each run, in the order of their numbers."""
        lines = []
        for number, (commit, cpu) in enumerate(self._runs, start=1):
            days = sorted({date[:10] or "day not recorded" for date in self._dates[commit, cpu]})
            when = " to ".join(dict.fromkeys((days[0], days[-1])))
            lines.append(f"{number}. commit {commit}, {cpu}, {when}")
        return lines

    def one(self, setting: str, row: str) -> Cells:
        """One case."""
        case = self._found.get(f"{setting}-{row}")
        if case is None:
            return Cells(NOT_RUN)
        length = case.get("acceptance_length")
        return Cells(
            case["outcome"],
            "" if length is None else f"{length:.1f}",
            str(self._runs.index(_run_of(case)) + 1),
            case.get("sentence", ""),
        )

    def together(self, setting: str, rows: Sequence[str]) -> Cells:
        """The worst outcome and the least acceptance length of several cases; one that fell back says nothing."""
        cases = [self.one(setting, row) for row in rows]
        outcomes = [case.outcome for case in cases if case.outcome != "falls back"]
        lengths = [case.length for case in cases if case.length and float(case.length) > 1]
        return Cells(
            min(outcomes, key=_rank, default=NOT_RUN),
            min(lengths, key=float, default=""),
            ", ".join(sorted({case.run for case in cases} - {""})),
        )


def _requests(results: Results) -> Iterator[str]:
    default = next(setting for setting in SETTINGS if setting.name == "default")
    for name in default.rows:
        row = BY_NAME[name]
        yield results.one("default", name).line(row.title, row.note)
    yield results.one("default", "streamed").line("detokenised streaming")


def _engines(results: Results) -> Iterator[str]:
    for setting in SETTINGS:
        asked = [BY_NAME[row].title for row in setting.rows]
        what = "all of the above" if len(asked) > 8 else "; ".join(asked)
        note = f"asked with: {what}" + (f". {setting.note}" if setting.note else "")
        yield results.together(setting.name, setting.rows).line(setting.title, note)


def _ways_in(results: Results) -> Iterator[str]:
    yield results.one("default", "greedy").line("`LLM`", "everything above")
    yield results.one("async_llm", "greedy").line("`AsyncLLM`")
    for way in ("vllm serve", "vllm serve, from the built wheel", "vllm bench"):
        yield results.one("way", way).line(f"`{way}`")


def _runners(results: Results) -> Iterator[str]:
    yield results.one("default", "greedy").line("V1 on a CPU", "everything above")
    for title, names in UNDER_V2.items():
        note = "on a CPU under Triton's interpreter; never ran on a GPU"
        yield results.together("v2", names).line(f"V2: {title}", note)
    for title, names in GPU_ADAPTER.items():
        note = "the GPU's adapter on CPU tensors under Triton's interpreter; never ran on a GPU"
        yield results.together("gpu", names).line(f"GPU: {title}", note)
    yield Cells(NOT_RUN).line("on a GPU", "refused until it is asked for")


def _without_maps(results: Results) -> Iterator[str]:
    for title, names in WITHOUT_MAPS.items():
        note = "its own drafts at every step, of texts that repeat themselves"
        yield results.together("without maps", names).line(title, note)


def _families(results: Results) -> Iterator[str]:
    for family in WORKING:
        yield results.one("family", family).line(family, "random checkpoint")
    for family in REFUSED:
        cells = results.one("family", family)
        yield cells.line(family, cells.sentence)


def _refusals(results: Results) -> Iterator[str]:
    for feature in REFUSALS:
        cells = results.one("refused", feature)
        yield cells.line(feature, cells.sentence)


def render(found: Found) -> str:
    """The table as Markdown."""
    results = Results(found)
    parts = {
        "request features": _requests(results),
        "engine features": _engines(results),
        "ways in": _ways_in(results),
        "model runners": _runners(results),
        "drafts without maps": _without_maps(results),
        "model families": _families(results),
        "refused when the configuration is checked": _refusals(results),
    }
    lines = [
        "Executed, not claimed: cases of `make matrix`, fp32 unless a row says otherwise. *works*: token ids, text, "
        "reasons to end, log-probabilities and ranks are those of the same vLLM without speculation. **fails**: it did "
        "not when it was last run. AL: acceptance length with planted drafts of 16 nodes (8 to 16 under V2), which "
        'shows that trees took part; it says nothing about real drafts. "run" is one of these; 1 is the newest, and '
        "what was last run in another was not run again since:",
        "",
        *results.runs(),
    ]
    for title, rows in parts.items():
        lines += ["", _line(title, "with trees", "AL", "run", "notes"), "|---|---|---|---|---|"]
        lines += rows
    return "\n".join(lines)


def with_table(page: str, table: str) -> str:
    """The page with the table between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    """Merge what was recorded and write the table."""
    found: Found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = dict(sorted({**found, **collect()}.items()))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), render(found)))


if __name__ == "__main__":
    main()
