# SPDX-License-Identifier: Apache-2.0
"""Ratio of throughput to no speculation by the number of requests at a time, of ours and of stock's n-grams.

    python -m benchmarks.concurrency --requests 1 --requests 8 --pairs 10
    python -m benchmarks.concurrency --requests 1 --pairs 12 --kind editing --side "without maps" --side "stock n-gram"

Engines stand side by side on the demo target: no speculation, ours as it comes, with ``always_draft``, and without maps
(``sources``), and vLLM's own n-gram method. They take turns on the same unseen prompts, one computing while the others
are idle, in another order each time. A round is several waves of requests, of which so many run at a time: where one
ends the next one takes its place, as in serving. It gives the ratio of output tokens a second; rounds give geometric
means with 95% intervals. No prompt comes twice while there are others. Rounds that were done are written at once, so
that Ctrl-C loses nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy import stats

from vllm_hidden_transfer.bench.demo import read_questions
from vllm_hidden_transfer.bench.engine_process import EngineProcess, acceptance_length
from vllm_hidden_transfer.machine import this_commit, this_machine

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "examples" / "smollm2-135m"
OFF = "no speculation"
METHOD = {"method": "hidden_transfer"}
MAPS = {**METHOD, "model": str(TARGET / "hidden_transfer")}
SIDES: dict[str, dict[str, Any]] = {
    "with the budget": MAPS,
    "drafting always": {**MAPS, "always_draft": True},
    "without maps": {**METHOD, "sources": ["recycling", "lookup"]},
    "stock n-gram": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4},
}
"""What is measured against no speculation."""
WARM_UP_TOKENS = 96
"""The budget learns what passes cost in its first seconds."""


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean and the ends of its 95% interval (Student's t on logarithms)."""
    logs = np.log(ratios)
    middle = float(logs.mean())
    if len(logs) < 2:
        return math.exp(middle), math.nan, math.nan
    spread = float(stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs))
    return math.exp(middle), math.exp(middle - spread), math.exp(middle + spread)


def engines(
    stack: ExitStack, folder: Path, names: Sequence[str], *, eager: bool, most: int
) -> dict[str, EngineProcess]:
    """No speculation and the named sides, all started together."""
    common: dict[str, Any] = {
        "model": str(TARGET),
        "dtype": "float32",
        "kv_cache_memory_bytes": 512 << 20,
        "max_model_len": 2048,
        "max_num_seqs": most,
        "block_size": 32,
        "enforce_eager": eager,
    }
    sides = {OFF: common, **{one: {**common, "speculative_config": SIDES[one]} for one in names}}
    made = {
        name: stack.enter_context(
            EngineProcess(name, options, folder / f"{name}.log", {"OMP_NUM_THREADS": "2"})
        )
        for name, options in sides.items()
    }
    for engine in made.values():
        engine.wait_ready(1200)
    return made


def chats(prompts: Iterator[str], count: int) -> list[list[dict[str, str]]]:
    """The next prompts as conversations."""
    return [[{"role": "user", "content": prompt}] for prompt in itertools.islice(prompts, count)]


def main(
    requests: Annotated[list[int], typer.Option(help="requests at a time; several times", min=1)],
    pairs: Annotated[int, typer.Option(help="rounds of each", min=1)] = 10,
    waves: Annotated[int, typer.Option(help="requests of a round, for each at a time", min=1)] = 4,
    tokens: Annotated[int, typer.Option(help="tokens of an answer", min=2)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    kind: Annotated[str, typer.Option(help="of prompts: chat, code or editing; all")] = "all",
    side: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(SIDES)}; all")] = None,
    eager: Annotated[bool, typer.Option(help="do not compile")] = False,
    output: Annotated[Path, typer.Option(help="raw figures")] = ROOT / "work" / "concurrency",
) -> None:
    """Measure and print a table."""
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    names = list(SIDES) if side is None else side
    for name in names:
        if name not in SIDES:
            raise typer.BadParameter(f"there is no side {name!r}: give one of {', '.join(SIDES)}.")
    asked = read_questions(ROOT / "examples" / "prompts" / "unseen.jsonl")
    questions = [one.prompt for one in asked if kind in ("all", one.kind)]
    if not questions:
        raise typer.BadParameter(
            f"there are no prompts of kind {kind!r}: give chat, code or editing."
        )
    np.random.default_rng(0).shuffle(questions)
    demo = read_questions(ROOT / "examples" / "prompts" / "demo.jsonl")
    warming = itertools.cycle([one.prompt for one in demo])
    sampling = {"temperature": temperature, "max_tokens": tokens, "ignore_eos": True, "seed": 1}
    title = f"{this_machine()}, commit {this_commit()}, T = {temperature:g}, {kind} prompts"
    table = Table(title=title)
    for column in ("requests", "side", "ratio", "95%", "tokens a pass"):
        table.add_column(column)
    prompts = itertools.cycle(questions)
    for count in requests:
        rates: dict[str, list[float]] = {name: [] for name in (OFF, *names)}
        lengths: dict[str, list[float]] = {name: [] for name in (OFF, *names)}
        with ExitStack() as stack:
            sides = engines(stack, output, names, eager=eager, most=count)
            for engine in sides.values():
                engine.generate(chats(warming, count), {**sampling, "max_tokens": WARM_UP_TOKENS})
            for round_ in range(pairs):
                batch = chats(prompts, waves * count)
                order = list(sides)
                turn = round_ % len(order)
                for name in order[turn:] + order[:turn]:
                    started = time.perf_counter()
                    answers = sides[name].generate(batch, sampling)
                    seconds = time.perf_counter() - started
                    rates[name].append(sum(len(one.token_ids) for one in answers) / seconds)
                    lengths[name].append(acceptance_length(answers))
                with (output / "rounds.jsonl").open("a") as file:
                    last = {name: each[-1] for name, each in rates.items()}
                    about = {"requests": count, "kind": kind, "T": temperature}
                    file.write(json.dumps({**about, "tokens_per_s": last}) + "\n")
        for name in names:
            ratios = [a / b for a, b in zip(rates[name], rates[OFF], strict=True)]
            middle, low, high = interval(ratios)
            between = f"{low:.2f} to {high:.2f}"
            table.add_row(
                str(count), name, f"{middle:.2f}", between, f"{np.mean(lengths[name]):.2f}"
            )
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
