# SPDX-License-Identifier: Apache-2.0
"""What `bench` makes of turns, windows and cells, without an engine (`tests/engine/test_bench.py` has real ones)."""

from __future__ import annotations

import io
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_hidden_transfer.bench import compare
from vllm_hidden_transfer.bench.charts import ratios_png
from vllm_hidden_transfer.bench.compare import OFF, BenchError, Results, Settings
from vllm_hidden_transfer.bench.engine_process import EngineProcess, Output, Turn
from vllm_hidden_transfer.bench.load import Progress, figures, interval, run
from vllm_hidden_transfer.cli import app

SETTINGS = Settings(
    target=Path("target"),
    checkpoint=Path("maps"),
    prompts=Path(__file__).parents[2] / "examples" / "prompts" / "unseen.jsonl",
    sides=("default",),
    requests=(1, 4),
    kinds=("mixed",),
    temperatures=(0.0,),
    windows=4,
    window_tokens=64,
    max_tokens=32,
    dtype="float32",
    eager=True,
    max_model_len=2048,
    kv_cache_memory_bytes=1 << 29,
)


class Scripted:
    """An engine that gives so many tokens in each step of so many seconds, to one request at a time."""

    def __init__(self, name: str, log: list[str], *, tokens: int, seconds: float = 1.0) -> None:
        self.name, self.log = name, log
        self.tokens, self.seconds = tokens, seconds
        self.clock, self.stopped = 0.0, False

    def load(self, prompts: list[Any], sampling: list[Any], at_a_time: int) -> None:
        self.left = list(range(len(prompts)))
        self.limit = sampling[0]["max_tokens"]
        self.given = 0

    def turn(self, seconds: float) -> Turn:
        self.log.append(self.name)
        index = self.left[0]
        began = [(self.clock, index)] if not self.given else []
        self.clock += self.seconds
        tokens = min(self.tokens, self.limit - self.given)
        self.given += tokens
        reason = "length" if self.given == self.limit else None
        if reason:
            self.left.pop(0)
            self.given = 0
        outputs = [Output(self.clock, index, [7] * tokens, reason)]
        return Turn(self.clock, began, outputs, not self.left)

    def stop(self) -> None:
        self.stopped = True


def scripted(prompts: int, tokens: int, windows: int) -> tuple[dict[str, Progress], list[str]]:
    """No speculation, and a side that gives three tokens a step of twice the time, after so many windows."""
    log: list[str] = []
    engines = {
        OFF: Scripted(OFF, log, tokens=1),
        "default": Scripted("default", log, tokens=3, seconds=2.0),
    }
    sampling = [{"max_tokens": 12}] * prompts
    running = run(cast(dict[str, EngineProcess], engines), [[1]] * prompts, sampling, 1, tokens)
    done = list(itertools.islice(running, windows))[-1]
    running.close()  # type: ignore[attr-defined]
    assert all(engine.stopped for engine in engines.values())
    return done, log


def test_the_engine_that_is_behind_goes_next() -> None:
    done, log = scripted(prompts=8, tokens=24, windows=2)
    assert {name: one.tokens for name, one in done.items()} == {OFF: 48, "default": 48}
    given = {OFF: 0, "default": 0}
    for name in log:
        others = [count for other, count in given.items() if other != name]
        assert given[name] <= min(others)
        given[name] += 1 if name == OFF else 3


def test_windows_are_cut_where_their_tokens_came() -> None:
    done, _ = scripted(prompts=8, tokens=24, windows=2)
    assert [done[OFF].seconds_of(window, 24) for window in (0, 1)] == [24.0, 24.0]
    assert [done["default"].seconds_of(window, 24) for window in (0, 1)] == [16.0, 16.0]


def test_a_load_that_is_answered_ends() -> None:
    done, _ = scripted(prompts=2, tokens=24, windows=5)
    assert done[OFF].tokens == 24
    assert len(done[OFF].ended) == 2


def test_figures_of_answers_are_on_the_engines_own_clock() -> None:
    done, _ = scripted(prompts=8, tokens=24, windows=1)
    off, on = figures(done[OFF]), figures(done["default"])
    assert (off.first_token_ms, off.each_token_ms, off.acceptance_length) == (1000, 1000, 1)
    assert on.first_token_ms == 2000
    assert on.each_token_ms == pytest.approx(6000 / 11)  # eleven came in three steps
    assert on.acceptance_length == pytest.approx(11 / 3)


def test_nobody_answered_has_no_figures() -> None:
    assert math.isnan(figures(Progress()).each_token_ms)


def test_a_cell_is_summed_up_without_its_first_window() -> None:
    done, _ = scripted(prompts=8, tokens=24, windows=3)
    found = compare.summary((1, "mixed", 0.0), done, 2, 24)
    side = found["sides"]["default"]
    assert (side["ratio"], side["low"], side["high"]) == pytest.approx((1.5, 1.5, 1.5))
    assert side["tokens_per_s"] == pytest.approx(1.5)
    assert (side["answers"], side["answers_alike"]) == (6, 6)
    done["default"].ended[0].token_ids[3] = 8
    assert compare.summary((1, "mixed", 0.0), done, 2, 24)["sides"]["default"]["answers_alike"] == 5


def test_an_interval_needs_two() -> None:
    assert interval([1.21])[0] == pytest.approx(1.21)
    assert math.isnan(interval([1.21])[1])
    middle, low, high = interval([1.0, 1.21])
    assert middle == pytest.approx(1.1)
    assert low < middle < high


def test_every_number_of_requests_is_a_cell() -> None:
    both = replace(SETTINGS, temperatures=(0.0, 0.8))
    assert both.cells() == [
        (1, "mixed", 0.0),
        (1, "mixed", 0.8),
        (4, "mixed", 0.0),
        (4, "mixed", 0.8),
    ]


def test_prompts_of_a_kind_are_its_own() -> None:
    found = compare.prompts_of(replace(SETTINGS, kinds=("mixed", "code")))
    assert (len(found["mixed"]), len(found["code"])) == (48, 16)
    assert set(found["code"]) < set(found["mixed"])
    with pytest.raises(BenchError, match=r"no prompts of kind 'poems'.*chat, code, editing, mixed"):
        compare.prompts_of(replace(SETTINGS, kinds=("poems",)))


def _cell(requests: int) -> dict[str, Any]:
    done, _ = scripted(prompts=8, tokens=24, windows=3)
    return compare.summary((requests, "mixed", 0.0), done, 2, 24)


def test_a_second_run_goes_on_where_the_first_was_stopped(tmp_path: Path) -> None:
    first = Results(tmp_path, SETTINGS)
    first.put((1, "mixed", 0.0), _cell(1), complete=True)
    first.put((4, "mixed", 0.0), _cell(4), complete=False)
    second = Results(tmp_path, SETTINGS)
    assert second.complete((1, "mixed", 0.0))
    assert not second.complete((4, "mixed", 0.0))


def test_another_run_does_not_mix_in(tmp_path: Path) -> None:
    Results(tmp_path, SETTINGS).put((1, "mixed", 0.0), _cell(1), complete=True)
    with pytest.raises(BenchError, match=r"another max_tokens \(32\).*--restart"):
        Results(tmp_path, replace(SETTINGS, max_tokens=64))
    (tmp_path / "bench.json").write_text("[]")
    with pytest.raises(BenchError, match="no result of this command"):
        Results(tmp_path, SETTINGS)


def test_the_table_says_what_was_lost(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    for one in compare.tables([_cell(1), _cell(4)]):
        console.print(one)
    console.print(compare.alike([_cell(1), _cell(4)]))
    output = cast(io.StringIO, console.file).getvalue()
    assert "1.50 to 1.50" in output
    assert "without speculation: 12 of 12" in output
    ratios_png([_cell(1), _cell(4)], "a title", tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--side", "eagle"], "There is no side 'eagle': give one of default, maps"),
        (["--target", "nowhere"], "There is no target in nowhere: give its folder with --target."),
    ],
)
def test_bad_options_are_one_sentence(arguments: list[str], said: str) -> None:
    found = CliRunner().invoke(app, ["bench", *arguments])
    assert found.exit_code == 1
    assert said in " ".join(found.output.split())
    assert len(json.dumps(found.output).split("\\n")) <= 2
