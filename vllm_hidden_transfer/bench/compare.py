# SPDX-License-Identifier: Apache-2.0
"""What speculation is worth on a target here: ratios to no speculation by load, of ours and of vLLM's own methods.

Engines of one vLLM stand side by side and take turns on the same load (`load`). A cell is one kind of prompts at one
temperature and one number of requests at a time; its windows of tokens give ratios, and those their geometric mean and
95% interval. The first window of a cell, in which prompts come all at once and the budget learns, is kept apart.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_hidden_transfer.bench.charts import ratios_png
from vllm_hidden_transfer.bench.demo import DemoError, read_questions
from vllm_hidden_transfer.bench.engine_process import EngineProcess
from vllm_hidden_transfer.bench.load import Progress, figures, interval, run
from vllm_hidden_transfer.machine import this_commit, this_machine

OFF = "no speculation"
MIXED = "mixed"
"""Prompts of all kinds by turns."""
LEAST_WINDOW = 192
"""Tokens of a window at least: one answer's luck must not be all of it."""
LEAST_WINDOWS = 3
"""Of a cell, however little time there is."""

Cell = tuple[int, str, float]
"""Requests at a time, kind of prompts, temperature."""


class BenchError(Exception):
    """The comparison cannot be made; the message is one sentence."""


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Two runs with the same ones may share a folder: the second goes on where the first was stopped.
    """

    target: Path
    checkpoint: Path
    prompts: Path
    sides: tuple[str, ...]
    requests: tuple[int, ...]
    kinds: tuple[str, ...]
    temperatures: tuple[float, ...]
    windows: int
    window_tokens: int
    """For each request at a time."""
    max_tokens: int
    dtype: str
    eager: bool
    max_model_len: int
    kv_cache_memory_bytes: int

    def cells(self) -> list[Cell]:
        """One request at a time first, then more."""
        return list(itertools.product(self.requests, self.kinds, self.temperatures))


def all_sides(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The speculative configurations that can be compared, by name."""
    ours: dict[str, Any] = {"method": "hidden_transfer"}
    maps = {**ours, "model": str(checkpoint)}
    return {
        "default": maps,
        "maps": {**maps, "sources": ["maps"]},
        "always": {**maps, "always_draft": True},
        "text": {**ours, "sources": ["lookup", "recycling"]},
        "n-gram": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4},
        "suffix": {"method": "suffix"},
    }


def usual_sides() -> tuple[str, ...]:
    """What is compared where nothing else is asked for: suffix decoding needs a package of its own."""
    suffix = ("suffix",) if importlib.util.find_spec("arctic_inference") else ()
    return ("default", "text", "n-gram", *suffix)


def prompts_of(settings: Settings) -> dict[str, list[str]]:
    """The prompts of each kind that is asked for, shuffled the same way each time."""
    questions = read_questions(settings.prompts)
    order = np.random.default_rng(0).permutation(len(questions))
    shuffled = [questions[place] for place in order]
    found = {
        kind: [one.prompt for one in shuffled if kind in (MIXED, one.kind)]
        for kind in settings.kinds
    }
    for kind, prompts in found.items():
        if not prompts:
            there = ", ".join(sorted({MIXED, *(one.kind for one in questions)}))
            raise BenchError(
                f"There are no prompts of kind {kind!r} in {settings.prompts}: give one of {there}."
            )
    return found


def start_engines(
    settings: Settings, folder: Path, stack: ExitStack, console: Console
) -> dict[str, EngineProcess]:
    """No speculation and the sides, all started together."""
    common: dict[str, Any] = {
        "model": str(settings.target),
        "dtype": settings.dtype,
        "kv_cache_memory_bytes": settings.kv_cache_memory_bytes,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": max(settings.requests),
        "block_size": 32,  # what hidden transfer prefers on a CPU, for all sides
        "enforce_eager": settings.eager,
    }
    known = all_sides(settings.checkpoint)
    options = {OFF: common}
    for name in settings.sides:
        options[name] = {**common, "speculative_config": known[name]}
    threads = os.environ.get("OMP_NUM_THREADS", str(this_machine().cores))
    engines = {}
    for name, kwargs in options.items():
        log = folder / f"{name.replace(' ', '_')}.log"
        engine = EngineProcess(name, kwargs, log, {"OMP_NUM_THREADS": threads})
        engines[name] = stack.enter_context(engine)
    with console.status(
        f"starting {len(engines)} engines ({'eager' if settings.eager else 'compiling'})"
    ):
        for engine in engines.values():
            engine.wait_ready(3600)
    return engines


@dataclass(frozen=True)
class Stopwatch:
    """When a cell has to be done."""

    ends: float | None

    def share(self, cells_left: int) -> float | None:
        """The end of the next of so many cells."""
        if self.ends is None:
            return None
        now = time.monotonic()
        return now + max(self.ends - now, 0.0) / cells_left


def measure(
    settings: Settings,
    engines: Mapping[str, EngineProcess],
    cell: Cell,
    prompts: Sequence[Sequence[int]],
    until: float | None,
) -> Iterator[dict[str, Any]]:
    """One cell, window after window: what is known of it so far."""
    requests, _, temperature = cell
    tokens = max(settings.window_tokens * requests, LEAST_WINDOW)
    count = requests + (settings.windows + 1) * tokens // 2
    endless = list(itertools.islice(itertools.cycle(prompts), count))
    sampling = [
        {"temperature": temperature, "max_tokens": settings.max_tokens, "seed": index}
        for index in range(count)
    ]
    for window, done in enumerate(run(engines, endless, sampling, requests, tokens)):
        if window:
            yield summary(cell, done, window, tokens)
        late = until is not None and time.monotonic() > until and window >= LEAST_WINDOWS
        if late or window == settings.windows:
            return


def summary(cell: Cell, done: Mapping[str, Progress], windows: int, tokens: int) -> dict[str, Any]:
    """The figures of a cell with so many windows behind the first."""
    requests, kind, temperature = cell
    seconds = {
        name: [one.seconds_of(window, tokens) for window in range(windows + 1)]
        for name, one in done.items()
    }
    off = done[OFF].ended
    sides = {}
    for name, one in done.items():
        ratios = [a / b for a, b in zip(seconds[OFF], seconds[name], strict=True)]
        ratio, low, high = interval(ratios[1:])
        both = one.ended.keys() & off.keys()
        sides[name] = {
            "ratio": ratio,
            "low": low,
            "high": high,
            "first_window": ratios[0],
            "tokens_per_s": windows * tokens / sum(seconds[name][1:]),
            **asdict(figures(one)),
            "answers": len(both),
            "answers_alike": sum(one.ended[each].token_ids == off[each].token_ids for each in both),
        }
    about = {"requests": requests, "kind": kind, "temperature": temperature}
    return {**about, "windows": windows, "window_tokens": tokens, "sides": sides}


def tables(cells: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """One for each kind of prompts and temperature: a row for each side and number of requests."""
    for kind, temperature in dict.fromkeys((cell["kind"], cell["temperature"]) for cell in cells):
        made = Table(title=f"{kind} prompts, temperature {temperature:g}")
        columns = ("side", "ratio", "95%", "tokens/s", "a pass", "first, ms", "each, ms")
        for column in ("requests", *columns):
            made.add_column(column)
        for cell in cells:
            if (cell["kind"], cell["temperature"]) == (kind, temperature):
                for row in _rows(cell):
                    made.add_row(*row)
                made.add_section()
        yield made


def _rows(cell: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    requests = str(cell["requests"])
    for name, side in cell["sides"].items():
        yield (
            requests,
            name,
            f"{side['ratio']:.2f}",
            "" if name == OFF else f"{side['low']:.2f} to {side['high']:.2f}",
            f"{side['tokens_per_s']:.1f}",
            f"{side['acceptance_length']:.2f}",
            f"{side['first_token_ms']:.0f}",
            f"{side['each_token_ms']:.0f}",
        )


def alike(cells: Sequence[Mapping[str, Any]]) -> str:
    """What the greedy answers were beside those without speculation."""
    sides = [
        side
        for cell in cells
        if not cell["temperature"]
        for name, side in cell["sides"].items()
        if name != OFF
    ]
    same, both = (sum(side[key] for side in sides) for key in ("answers_alike", "answers"))
    return f"greedy answers that are token for token those without speculation: {same} of {both}"


class Results:
    """What was measured, in one JSON file that a later run goes on with."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.path = folder / "bench.json"
        self._settings = json.loads(json.dumps(asdict(settings), default=str))
        # Of the start: the engines compute with what the checkout was then.
        self._about = {"machine": str(this_machine()), "commit": this_commit()}
        self.cells: dict[Cell, dict[str, Any]] = {}
        if not self.path.is_file():
            return
        try:
            found = json.loads(self.path.read_text())
            before, cells = found["settings"], found["cells"]
        except (ValueError, KeyError, TypeError):
            raise BenchError(
                f"{self.path} is no result of this command: move it away or give another --output."
            ) from None
        others = [key for key, value in self._settings.items() if before.get(key) != value]
        if others:
            raise BenchError(
                f"{self.path} was made with another {others[0]} ({before.get(others[0])}): "
                f"give another --output, or --restart to begin anew."
            )
        for cell in cells:
            self.cells[cell["requests"], cell["kind"], cell["temperature"]] = cell

    def complete(self, cell: Cell) -> bool:
        return cell in self.cells and self.cells[cell]["complete"]

    def put(self, cell: Cell, figures: Mapping[str, Any], *, complete: bool) -> None:
        """Keep what is known of a cell: a kill loses at most the window under way."""
        self.cells[cell] = {**figures, **self._about, "complete": complete}
        temporary = self.path.with_suffix(".new")
        found = {"settings": self._settings, "cells": list(self.cells.values())}
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(self.path)


def run_bench(settings: Settings, folder: Path, console: Console, minutes: float | None) -> None:
    """Measure, print a table, and write it as JSON and as a picture; BenchError where that cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder, settings)
    try:
        prompts = prompts_of(settings)
    except DemoError as error:
        raise BenchError(str(error)) from None
    watch = Stopwatch(None if minutes is None else time.monotonic() + 60 * minutes)
    left = [cell for cell in settings.cells() if not results.complete(cell)]
    if left:
        with ExitStack() as stack:
            engines = start_engines(settings, folder, stack, console)
            for place, cell in enumerate(left):
                _measure_and_keep(
                    settings,
                    engines,
                    cell,
                    prompts,
                    results,
                    watch.share(len(left) - place),
                    console,
                )
    cells = [results.cells[cell] for cell in settings.cells() if cell in results.cells]
    how = "eager" if settings.eager else "compiled"
    title = (
        f"{settings.target.name}, {this_machine()}, commit {this_commit()}, {settings.dtype}, {how}"
    )
    console.print(title, soft_wrap=True)
    for one in tables(cells):
        console.print(one)
    if 0.0 in settings.temperatures:
        console.print(alike(cells))
    picture = folder / "bench.png"
    ratios_png(cells, title, picture)
    console.print(f"(also {results.path} and {picture})")


def _measure_and_keep(
    settings: Settings,
    engines: Mapping[str, EngineProcess],
    cell: Cell,
    prompts: Mapping[str, Sequence[str]],
    results: Results,
    until: float | None,
    console: Console,
) -> None:
    requests, kind, temperature = cell
    what = f"{requests} requests at a time, {kind} prompts, temperature {temperature:g}"
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts[kind]]
    ids = engines[OFF].token_ids(chats)
    found: dict[str, Any] = {}
    with console.status(what) as status:
        for found in measure(settings, engines, cell, ids, until):
            results.put(cell, found, complete=False)
            ratios = [
                f"{name} {side['ratio']:.2f}"
                for name, side in found["sides"].items()
                if name != OFF
            ]
            status.update(f"{what}: {', '.join(ratios)} after {found['windows']} windows")
    results.put(cell, found, complete=True)
    console.print(f"{what}: {', '.join(ratios)}")
