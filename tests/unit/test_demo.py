# SPDX-License-Identifier: Apache-2.0
"""The demo's arithmetic and its messages, without an engine."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.models import tiny_llama
from vllm_hidden_transfer.bench.charts import per_depth_png, per_depth_table
from vllm_hidden_transfer.bench.demo import (
    Answers,
    DemoError,
    Question,
    Settings,
    banner,
    end_tokens,
    judge_answers,
    per_depth_rates,
    read_questions,
    result_table,
    run_demo,
    tokens_per_second,
    verdict_lines,
)
from vllm_hidden_transfer.bench.engine_process import Generation, SpecCounters
from vllm_hidden_transfer.bench.identity import Finding, Judgement, Verdict
from vllm_hidden_transfer.machine import parse_cpuinfo

REPOSITORY = Path(__file__).resolve().parents[2]


def _generation(token_ids: list[int], steps: list[int], seconds: float) -> Generation:
    return Generation(
        prompt_ids=[7, 8, 9],
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


def _found(*verdicts: Verdict, **finding: Any) -> Judgement:
    numbers: Any = {"gap": 0.031, "behind": 0.031, "spread": 0.062, "bound": 0.062}
    findings = tuple(
        Finding(prompt, 2, 3, 9, **numbers, verdict=verdict)
        for prompt, verdict in enumerate(verdicts)
        if verdict is not Verdict.IDENTICAL
    )
    return Judgement(verdicts, findings)


def test_identical_texts_are_said_in_one_line() -> None:
    answers = [_answers("chat"), _answers("code")]
    found = _found(Verdict.IDENTICAL, Verdict.IDENTICAL)
    assert verdict_lines(found, answers, "float32") == ["identical: 2 of 2"]


def test_where_texts_part_the_three_counts_are_said_with_gap_and_spread() -> None:
    answers = [_answers("chat"), _answers("code"), _answers("editing")]
    found = _found(Verdict.IDENTICAL, Verdict.ROUNDING, Verdict.WRONG)
    counts, rounding, wrong, note = verdict_lines(found, answers, "bfloat16")
    assert counts == "identical: 1, rounding: 1, wrong: 1 of 3"
    assert rounding == "  code-1, prompt 1, token 2: 9 for 3: gap 0.031, spread 0.062: rounding"
    assert wrong.startswith("  editing-1")
    assert "bfloat16" in note


class FakePlain:
    """Continues every prefix by the same tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.asked: list[Any] = []

    def generate(self, prefixes: list[list[int]], sampling: list[dict[str, Any]]) -> list[Any]:
        self.asked.append((prefixes, sampling))
        return [_generation(self.tokens, [1], 1.0) for _ in prefixes]


@pytest.mark.parametrize(("tested", "wrong"), [([1, 9, 9, 9], True), ([1, 2, 3, 0], False)])
def test_the_answers_are_judged_to_the_end_token(
    tested: list[int], wrong: bool, tmp_path: Path
) -> None:
    """A random target's second best token with a gap that fp32 cannot move, and the very text."""
    tiny_llama(16).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    assert {0, 5} <= end_tokens(tmp_path)
    plain, hidden = _generation([1, 2, 3, 0], [1] * 4, 1.0), _generation(tested, [4], 1.0)
    answers = [Answers(Question("a", "chat", "?"), plain, hidden)]
    engine: Any = FakePlain([])
    found = judge_answers(answers, engine, _settings(tmp_path))
    assert bool(found.wrong) == wrong
    assert engine.asked == []


def test_per_depth_acceptance_is_a_share_of_the_passes_with_drafts() -> None:
    counters = SpecCounters(8, 128, 10, (6, 4, 0, 0, 0, 0))
    assert per_depth_rates(counters, depths=3) == [0.75, 0.5, 0.0]
    copied = SpecCounters(8, 128, 14, (6, 4, 2, 1, 1, 0, 0))
    assert per_depth_rates(copied, depths=3) == [0.75, 0.5, 0.25, 0.125, 0.125]


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


def _settings(folder: Path) -> Settings:
    return Settings(
        target=folder,
        checkpoint=folder / "hidden_transfer",
        prompts=folder / "prompts.jsonl",
        output=folder / "out",
        budget=None,
        max_tokens=8,
        eager=True,
        command="demo",
    )


def test_missing_maps_are_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    settings = _settings(tmp_path)
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
