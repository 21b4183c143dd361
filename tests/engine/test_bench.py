# SPDX-License-Identifier: Apache-2.0
"""`vllm-hidden-transfer bench` on real engines: the same load on both, answers alike, and a second run that goes on."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_hidden_transfer.bench.engine_process import EngineProcess
from vllm_hidden_transfer.cli import app

pytestmark = pytest.mark.engine


def test_bench(demo_target: Path, tmp_path: Path) -> None:
    command = ["bench", "--eager", "--target", str(demo_target), "--side", "text"]
    command += ["--requests", "3", "--windows", "2", "--window-tokens", "40", "--max-tokens", "24"]
    command += ["--prompts", str(demo_target.parent / "prompts" / "demo.jsonl")]
    command += ["--output", str(tmp_path)]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    (cell,) = json.loads((tmp_path / "bench.json").read_text())["cells"]
    assert (cell["requests"], cell["windows"], cell["complete"]) == (3, 2, True)
    assert set(cell["sides"]) == {"no speculation", "text"}
    for side in cell["sides"].values():
        assert side["answers_alike"] == side["answers"] > 8
        assert side["tokens_per_s"] > 0
        assert 0 < side["each_token_ms"] < side["first_token_ms"]
    assert cell["sides"]["no speculation"]["acceptance_length"] == 1
    assert (tmp_path / "bench.png").exists()
    assert re.search(r"without speculation: (\d+) of \1", found.output)

    began = time.monotonic()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert time.monotonic() - began < 10  # no engine was started
    assert again.output.splitlines()[-1].split("(also")[-1] in found.output


def test_a_load_can_be_stopped_and_another_follows(random_target: Path, tmp_path: Path) -> None:
    options = {"model": str(random_target), "kv_cache_memory_bytes": 64 << 20, "max_model_len": 256}
    options |= {"enforce_eager": True, "skip_tokenizer_init": True, "dtype": "float32"}
    sampling = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, "detokenize": False}
    with EngineProcess("alone", options, tmp_path / "engine.log") as engine:
        engine.load([[5, 6, 7]] * 6, [sampling] * 6, at_a_time=2)
        first = engine.turn(0.0)
        assert [index for _, index in first.began] == [0, 1]
        assert not first.over
        engine.stop()
        engine.load([[5, 6, 7]] * 3, [sampling] * 3, at_a_time=2)
        turns = [engine.turn(0.0)]
        while not turns[-1].over:
            turns.append(engine.turn(0.0))
        engine.stop()
    began = [index for turn in turns for _, index in turn.began]
    outputs = [output for turn in turns for output in turn.outputs]
    assert began == [0, 1, 2]
    assert len(outputs) == 60  # a token a step for each, and nothing of the load before
    last = next(number for number, turn in enumerate(turns) if (2 in (i for _, i in turn.began)))
    assert any(one.finish_reason for one in turns[last - 1].outputs)
    clocks = [turn.clock for turn in turns]
    assert clocks == sorted(clocks)
