# SPDX-License-Identifier: Apache-2.0
"""The README's scope table, from what the feature matrix recorded: ``make scope`` after ``make matrix``.

Results go from ``work/matrix/`` into ``benchmarks/feature_matrix.json``, and from there into the README between two
marks. A case that was declared but not recorded stands there as "not run".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.matrix.record import FOLDER
from tests.matrix.rows import BY_NAME
from tests.matrix.settings import SETTINGS
from tests.matrix.test_families import REFUSED, WORKING
from tests.matrix.test_refusals import REFUSALS
from vllm_hidden_transfer.evaluation.machine import this_machine

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "feature_matrix.json"
BEGIN, END = "<!-- scope table: begin (make scope) -->", "<!-- scope table: end -->"

Found = dict[str, dict[str, Any]]

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
    "hidden-transfer drafts: those of V1, no waiting for the device": ["drafts"],
}
"""What the tests under V2 record, by the table's row."""


def collect() -> Found:
    """What is in ``work/matrix/``, by case."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _case(found: Found, setting: str, row: str) -> tuple[str, str]:
    """Outcome and acceptance length of one case."""
    case = found.get(f"{setting}-{row}")
    if case is None:
        return "not run", ""
    length = case.get("acceptance_length")
    return case["outcome"], "" if length is None else f"{length:.1f}"


def _together(cases: list[tuple[str, str]]) -> tuple[str, str]:
    """One outcome and the least acceptance length of several cases."""
    outcomes = {outcome for outcome, _ in cases if outcome != "falls back"}
    outcome = outcomes.pop() if len(outcomes) == 1 else "not run"
    lengths = [length for _, length in cases if length and float(length) > 1]
    return outcome, min(lengths, key=float, default="")


def _requests(found: Found) -> Iterator[str]:
    default = next(setting for setting in SETTINGS if setting.name == "default")
    for name in default.rows:
        row = BY_NAME[name]
        yield _line(row.title, *_case(found, "default", name), row.note)
    yield _line("detokenised streaming", *_case(found, "default", "streamed"), "")


def _engines(found: Found) -> Iterator[str]:
    for setting in SETTINGS:
        cases = [_case(found, setting.name, row) for row in setting.rows]
        asked = [BY_NAME[row].title for row in setting.rows]
        what = "all of the above" if len(asked) > 8 else "; ".join(asked)
        yield _line(
            setting.title,
            *_together(cases),
            f"asked with: {what}" + (f". {setting.note}" if setting.note else ""),
        )


def _ways_in(found: Found) -> Iterator[str]:
    yield _line("`LLM`", *_case(found, "default", "greedy"), "everything above")
    yield _line("`AsyncLLM`", *_case(found, "async_llm", "greedy"), "")
    for way in ("vllm serve", "vllm serve, from the built wheel", "vllm bench"):
        yield _line(f"`{way}`", *_case(found, "way", way), "")


def _runners(found: Found) -> Iterator[str]:
    yield _line("V1 on a CPU", *_case(found, "default", "greedy"), "everything above")
    for title, names in UNDER_V2.items():
        cases = [_case(found, "v2", name) for name in names]
        note = "on a CPU under Triton's interpreter; never ran on a GPU"
        yield _line(f"V2: {title}", *_together(cases), note)
    yield _line(
        "V1 or V2 on a GPU", "not run", "", "refused: there is no tree attention for one yet"
    )


def _families(found: Found) -> Iterator[str]:
    for family in WORKING:
        yield _line(family, *_case(found, "family", family), "random checkpoint")
    for family in REFUSED:
        case = found.get(f"family-{family}", {})
        yield _line(family, case.get("outcome", "not run"), "", case.get("sentence", ""))


def _refusals(found: Found) -> Iterator[str]:
    for feature in REFUSALS:
        case = found.get(f"refused-{feature}", {})
        yield _line(feature, case.get("outcome", "not run"), "", case.get("sentence", ""))


def render(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    found: Found = results["cases"]
    parts = {
        "request features": _requests(found),
        "engine features": _engines(found),
        "ways in": _ways_in(found),
        "model runners": _runners(found),
        "model families": _families(found),
        "refused when the configuration is checked": _refusals(found),
    }
    lines = [
        f"Executed, not claimed: cases of `make matrix` on {results['machine']}, fp32. *works*: token ids, text, "
        "reasons to end, log-probabilities and ranks are those of the same vLLM without speculation. AL: acceptance "
        "length with planted drafts of 16 nodes (8 to 16 under V2), which shows that trees took part; it says nothing "
        "about real drafts.",
    ]
    for title, rows in parts.items():
        lines += ["", _line(title, "with trees", "AL", "notes"), "|---|---|---|---|", *rows]
    return "\n".join(lines)


def with_table(readme: str, table: str) -> str:
    """The README with the table between its marks."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    """Merge what was recorded and write the README's table."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    new = collect()
    if new:
        machine = this_machine()
        results["machine"] = str(machine)
    results["cases"] = dict(sorted({**results["cases"], **new}.items()))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    README.write_text(with_table(README.read_text(), render(results)))


if __name__ == "__main__":
    main()
