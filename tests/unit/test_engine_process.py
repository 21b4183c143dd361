# SPDX-License-Identifier: Apache-2.0
"""The two-sided runner without vLLM: counting, reading counters, and children that die."""

import math
from pathlib import Path

import pytest

from vllm_hidden_transfer.bench.engine_process import (
    EngineDiedError,
    EngineProcess,
    Generation,
    SpecCounters,
    acceptance_length,
    last_error_line,
    spec_counters,
)


def _generation(step_tokens: list[int]) -> Generation:
    return Generation(
        prompt_ids=[1] * 5,
        token_ids=list(range(sum(step_tokens))),
        step_seconds=[0.5 + step for step in range(len(step_tokens))],
        step_tokens=step_tokens,
    )


def test_the_step_that_ends_the_prompt_is_no_decode_pass() -> None:
    generation = _generation([1, 3, 2])
    assert (generation.decoded, generation.passes) == (5, 2)
    assert generation.seconds == 2.5
    assert generation.decode_seconds == 2.0


def test_acceptance_length_is_summed_over_requests() -> None:
    assert acceptance_length([_generation([1, 4]), _generation([1, 1, 1])]) == pytest.approx(2.0)
    assert acceptance_length([_generation([1, 1, 1])]) == 1.0


def test_a_request_of_one_token_has_no_acceptance_length() -> None:
    assert math.isnan(acceptance_length([_generation([1])]))


def test_counters_are_read_by_vllms_names_and_subtracted() -> None:
    def metrics(drafts: int, per_depth: list[int]) -> list[dict[str, object]]:
        return [
            {"name": "vllm:num_requests_running", "labels": {}, "value": 0.0},
            {"name": "vllm:spec_decode_num_drafts", "labels": {}, "value": drafts},
            {"name": "vllm:spec_decode_num_draft_tokens", "labels": {}, "value": 16 * drafts},
            {"name": "vllm:spec_decode_num_accepted_tokens", "labels": {}, "value": sum(per_depth)},
            {
                "name": "vllm:spec_decode_num_accepted_tokens_per_pos",
                "labels": {},
                "value": per_depth,
            },
        ]

    spent = spec_counters(metrics(10, [8, 3])) - spec_counters(metrics(4, [3, 1]))
    assert spent == SpecCounters(6, 96, 7, (5, 2))
    assert spec_counters(metrics(4, [3, 1])) - SpecCounters() == SpecCounters(4, 64, 4, (3, 1))


def test_an_engine_without_speculation_has_no_counters() -> None:
    assert spec_counters([{"name": "vllm:num_requests_running", "labels": {}, "value": 0.0}]) == (
        SpecCounters()
    )


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("Traceback\nValueError: no room\n\n", "ValueError: no room"),
        (
            "a.b.CError: it broke\nERROR 11-21 14:00:00 [core.py:1] shutting down",
            "a.b.CError: it broke",
        ),
        ("ERROR 11-21 14:00:00 [core.py:1] ValueError: no room\nbye", "ValueError: no room"),
        ("killed\n", "killed"),
        ("", "it printed nothing"),
    ],
)
def test_the_last_error_line_is_found(log: str, line: str) -> None:
    assert last_error_line(log) == line


def test_a_child_that_dies_is_one_sentence_with_its_error(tmp_path: Path) -> None:
    # A package of that name that breaks at import stands in for a vLLM that cannot start.
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('no room for weights')\n")
    log = tmp_path / "logs" / "child.log"
    with (
        EngineProcess("left", {"model": "x"}, log, {"PYTHONPATH": str(tmp_path)}) as engine,
        pytest.raises(EngineDiedError) as death,
    ):
        engine.wait_ready()
    message = str(death.value)
    assert "'left'" in message
    assert "RuntimeError: no room for weights" in message
    assert str(log) in message
    assert "\n" not in message


def test_closing_an_engine_that_is_still_starting_ends_its_process(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("import time\ntime.sleep(600)\n")
    engine = EngineProcess("left", {}, tmp_path / "child.log", {"PYTHONPATH": str(tmp_path)})
    engine.close()
    with pytest.raises(EngineDiedError, match="ended with status -9"):
        engine.wait_ready()
