# SPDX-License-Identifier: Apache-2.0
"""The demo's arithmetic and its messages, without an engine."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from vllm_hidden_transfer.evaluation.charts import per_depth_png, per_depth_table
from vllm_hidden_transfer.evaluation.demo import (
    Answers,
    DemoError,
    Question,
    Settings,
    banner,
    first_difference,
    per_depth_rates,
    read_questions,
    result_table,
    run_demo,
    tokens_per_second,
)
from vllm_hidden_transfer.evaluation.engine_process import Generation, SpecCounters
from vllm_hidden_transfer.evaluation.machine import parse_cpuinfo

REPOSITORY = Path(__file__).resolve().parents[2]


def _generation(token_ids: list[int], steps: list[int], seconds: float) -> Generation:
    return Generation(
        prompt_tokens=3,
        token_ids=token_ids,
        step_seconds=[seconds * (at + 1) / len(steps) for at in range(len(steps))],
        step_tokens=steps,
    )


def _answers(kind: str, hidden_ids: list[int] | None = None) -> Answers:
    ids = [1, 2, 3, 4, 5]
    return Answers(
        Question(f"{kind}-1", kind, "?"),
        _generation(ids, [1] * 5, 5.0),
        _generation(ids if hidden_ids is None else hidden_ids, [1, 3, 1], 2.5),
    )


def _text(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_speed_is_tokens_over_time_not_a_mean_of_speeds() -> None:
    slow, fast = _generation([1] * 4, [1] * 4, 8.0), _generation([1] * 4, [1] * 4, 2.0)
    assert tokens_per_second([slow, fast]) == pytest.approx(0.8)


def test_the_table_shows_each_kind_and_all() -> None:
    table = _text(result_table([_answers("chat"), _answers("code")]))
    (all_row,) = (line for line in table.splitlines() if line.strip("│ ").startswith("all"))
    assert [cell.strip() for cell in all_row.strip("│\n").split("│")] == (
        ["all", "2.00", "1.0", "2.0", "2.00"]
    )
    assert "chat" in table
    assert "code" in table


@pytest.mark.parametrize(
    ("hidden_ids", "position"), [([1, 2, 9, 4, 5], 2), ([1, 2, 3], 3), ([9, 2, 3, 4, 5], 0)]
)
def test_a_difference_is_found_where_it_begins(hidden_ids: list[int], position: int) -> None:
    answers = _answers("chat", hidden_ids)
    assert not answers.identical
    assert first_difference(answers) == position


def test_per_depth_acceptance_is_a_share_of_the_passes_with_drafts() -> None:
    counters = SpecCounters(8, 128, 10, (6, 4, 0, 0, 0, 0))
    assert per_depth_rates(counters, depths=3) == [0.75, 0.5, 0.0]


def test_the_plugins_own_line_is_found_in_the_log() -> None:
    log = "noise\nINFO 11-21 [runner.py:1] hidden_transfer is on: two-pass, k = 4\nnoise"
    assert banner(log) == "hidden_transfer is on: two-pass, k = 4"
    assert banner("noise") == ""


def test_the_charts_show_every_depth(tmp_path: Path) -> None:
    chart = _text(per_depth_table([0.75, 0.5, 0.0]))
    assert [line.split()[-1] for line in chart.splitlines()] == ["75%", "50%", "0%"]
    path = tmp_path / "new" / "chart.png"
    per_depth_png([0.75, 0.5, 0.0], "a title", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_committed_questions_are_of_three_kinds_and_unlike_the_judging_ones() -> None:
    prompts = REPOSITORY / "examples" / "prompts"
    questions = read_questions(prompts / "demo.jsonl")
    kinds = [question.kind for question in questions]
    assert {kind: kinds.count(kind) for kind in kinds} == {"chat": 3, "code": 3, "editing": 3}
    unseen = {json.loads(line)["prompt"] for line in (prompts / "unseen.jsonl").open()}
    assert not unseen.intersection(question.prompt for question in questions)


@pytest.mark.parametrize("content", ['{"id": "a"}', "no json", '{"id": "a", "prompt": "b"}'])
def test_a_broken_prompt_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(DemoError, match="id, kind and prompt"):
        read_questions(path)
    with pytest.raises(DemoError, match="cannot be read"):
        read_questions(tmp_path / "nowhere.jsonl")


def test_missing_maps_are_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    settings = Settings(
        target=tmp_path,
        checkpoint=tmp_path / "hidden_transfer",
        prompts=tmp_path / "prompts.jsonl",
        output=tmp_path / "out",
        budget=None,
        max_tokens=4,
        eager=True,
        command="demo",
    )
    with pytest.raises(DemoError, match="no transfer maps in"):
        run_demo(settings, Console(file=io.StringIO()))
    assert not settings.output.exists()


CPUINFO = (
    "processor\t: 0\nmodel name\t: A CPU @ 2.80GHz\nflags\t\t: fpu avx2 {}\nbugs\t\t: none\n\n"
)


@pytest.mark.parametrize(
    ("flags", "dtype", "vector_set"),
    [
        ("", "float32", "avx2"),
        ("avx512f", "float32", "avx512f"),
        ("avx512f avx512_bf16", "bfloat16", "avx512_bf16"),
        ("avx512_bf16 amx_bf16 amx_tile", "bfloat16", "amx_bf16"),
    ],
)
def test_the_dtype_follows_the_cpu(flags: str, dtype: str, vector_set: str) -> None:
    machine = parse_cpuinfo(CPUINFO.format(flags) * 2, cores=2)
    assert machine.model == "A CPU @ 2.80GHz"
    assert (machine.dtype, machine.vector_set) == (dtype, vector_set)
    assert ("emulate" in machine.dtype_reason) == (dtype == "float32")
