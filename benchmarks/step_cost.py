# SPDX-License-Identifier: Apache-2.0
"""What a step costs: no speculation, stock's chain and our tree, in one run, in lockstep.

    python -m benchmarks.step_cost --rounds 10

Three compiled engines stand side by side: no speculation, stock ``custom_class``, and ours. What is compared takes
turns step by step, one engine computing while the others are idle, because a shared machine's speed drifts within a
second. Both speculating sides get the same planted drafts, of which two tokens are accepted a step. A round gives the
median of its steps' ratios; rounds give geometric means with 95% intervals. The raw figures are written after every
round; stopped by Ctrl-C, it reports the rounds that it has.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import stats

from tests.doubles.planted import ANSWERS_VARIABLE, Shape, write_answers
from tests.doubles.step_cost import (
    CHECKPOINT_VARIABLE,
    FOLDER_VARIABLE,
    Control,
)
from vllm_hidden_transfer.bench.engine_process import EngineProcess
from vllm_hidden_transfer.checkpoint.maps import load_checkpoint
from vllm_hidden_transfer.checkpoint.vocabulary import load_vocabulary
from vllm_hidden_transfer.machine import this_commit, this_machine
from vllm_hidden_transfer.names import TEST_DRAFTS_VARIABLE

ROOT = Path(__file__).parents[1]
TREES = (4, 8, 16)
BATCH_SIZES = (1, 8)
MODULE = "tests.doubles.step_cost"


@dataclass(frozen=True)
class Case:
    """One kind of step of one engine."""

    name: str
    engine: str
    shape: Shape
    draft_pass: bool = False


@dataclass(frozen=True)
class Comparison:
    """Cases of different engines that take turns step by step; the first one is no speculation."""

    cases: tuple[Case, ...]

    @property
    def name(self) -> str:
        """The last case's: what is measured."""
        return self.cases[-1].name


OFF = Case("no speculation", "off", Shape("none", 0))


def _beside_stock(case: Case, nodes: int) -> Comparison:
    return Comparison((OFF, Case(f"stock chain {nodes}", "stock", Shape("chain", nodes)), case))


COMPARISONS = [
    Comparison((OFF, Case("our step without drafts", "ours", Shape("none", 0)))),
    *(_beside_stock(Case(f"our chain {n}", "ours", Shape("chain", n)), n) for n in TREES),
    *(_beside_stock(Case(f"our bushy tree {n}", "ours", Shape("bushy", n)), n) for n in TREES),
    # A draft pass has k = 4 rows a request, as many as a stock chain of 3 drafts.
    _beside_stock(Case("draft pass", "ours", Shape("none", 0), draft_pass=True), 3),
]


def main(
    target: Annotated[Path, typer.Option(help="the target's folder")] = ROOT
    / "examples/smollm2-135m",
    checkpoint: Annotated[Path | None, typer.Option(help="its transfer checkpoint")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="interleaved rounds")] = 10,
    case: Annotated[list[str] | None, typer.Option(help="only these of our cases, by name")] = None,
    steps: Annotated[int, typer.Option(min=4, help="steps of one round")] = 12,
    eager: Annotated[bool, typer.Option(help="eager engines, for a quick look")] = False,
    output: Annotated[Path, typer.Option(help="where the JSON goes")] = ROOT
    / "work/step_cost.json",
) -> None:
    """Measure step times at 1 and 8 requests and print the table."""
    comparisons = chosen_comparisons(case)
    checkpoint = checkpoint or target / "hidden_transfer"
    machine = this_machine()
    dtype = machine.dtype
    console = Console()
    described = f"{machine}, {dtype}, 2 threads, commit {this_commit()}"
    console.print(f"{described}, {'eager' if eager else 'compiled'}: {machine.dtype_reason}")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        names = {each.engine for comparison in comparisons for each in comparison.cases}
        engines = start_engines(stack, names, folder, target, checkpoint, dtype, eager)
        ids = plant_answers(engines["off"], folder, target, steps)
        seconds: Seconds = {
            str(count): {each.name: [] for each in comparisons} for count in BATCH_SIZES
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            for found in measure(engines, comparisons, folder, ids, rounds, steps, console):
                for (count, comparison), one in found.items():
                    seconds[count][comparison].append(one)
                output.write_text(json.dumps({"machine": described, "seconds": seconds}))
        except KeyboardInterrupt:
            console.print("stopped: the figures are of the rounds that were finished")
    if len(seconds[str(BATCH_SIZES[0])][comparisons[0].name]) < 2:
        raise typer.Exit(1)  # an interval needs two rounds
    report(seconds, comparisons, console, byte_share(target, checkpoint))
    console.print(f"raw figures: {output}")


def chosen_comparisons(names: list[str] | None) -> list[Comparison]:
    """What was asked for, or everything."""
    known = [comparison.name for comparison in COMPARISONS]
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"there is no case {name!r}: the cases are {', '.join(known)}")
    return [each for each in COMPARISONS if not names or each.name in names]


def start_engines(
    stack: ExitStack,
    names: set[str],
    folder: Path,
    target: Path,
    checkpoint: Path,
    dtype: str,
    eager: bool,
) -> dict[str, EngineProcess]:
    """The engines that are needed, ready."""
    env = {
        "OMP_NUM_THREADS": "2",
        FOLDER_VARIABLE: str(folder),
        TEST_DRAFTS_VARIABLE: "1",
        CHECKPOINT_VARIABLE: str(checkpoint),
        ANSWERS_VARIABLE: str(folder / "answers.json"),
    }
    common: dict[str, Any] = {
        "model": str(target),
        "dtype": dtype,
        "enforce_eager": eager,
        # Scratch for tree paths is an eighth of it: with less, 8 requests have their trees cut.
        "kv_cache_memory_bytes": 1 << 31,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "block_size": 32,
        "enable_prefix_caching": False,
    }
    most = max(TREES)
    speculation: dict[str, dict[str, Any]] = {
        "off": {},
        "stock": {
            "speculative_config": {
                "method": "custom_class",
                "model": f"{MODULE}.StockChainProposer",
                "num_speculative_tokens": most,
            }
        },
        "ours": {
            "speculative_config": {"method": "hidden_transfer", "num_speculative_tokens": most},
            "additional_config": {"hidden_transfer": {"draft_source": f"{MODULE}:StepCostSource"}},
        },
    }
    Control.write(folder, Shape("none", 0))
    write_answers(folder / "answers.json", [], 1)
    engines = {}
    for name, options in speculation.items():
        if name not in names:
            continue
        log = ROOT / "work" / "step_cost" / f"{name}.log"
        engines[name] = stack.enter_context(EngineProcess(name, {**common, **options}, log, env))
    for engine in engines.values():
        engine.wait_ready()
    return engines


Round = dict[str, list[float]]
"""The seconds of all steps of each case."""

Seconds = dict[str, dict[str, list[Round]]]
"""By number of requests and comparison: the rounds."""


def plant_answers(off: EngineProcess, folder: Path, target: Path, steps: int) -> list[list[int]]:
    """Let the engine without speculation answer the prompts, for the drafts to be right where they should be.

    Returns:
        The prompts' token ids.
    """
    lines = (ROOT / "examples/prompts/unseen.jsonl").read_text().splitlines()
    prompts = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines[::6]][
        : max(BATCH_SIZES)
    ]
    params = {"temperature": 0.0, "ignore_eos": True}
    reference = off.generate(prompts, {**params, "max_tokens": 4 * steps})
    vocabulary = json.loads((target / "config.json").read_text())["vocab_size"]
    ids = prompt_ids(target, prompts)
    sequences = [
        [*prompt, *answer.token_ids] for prompt, answer in zip(ids, reference, strict=True)
    ]
    write_answers(folder / "answers.json", sequences, vocabulary)
    return ids


def measure(
    engines: dict[str, EngineProcess],
    comparisons: list[Comparison],
    folder: Path,
    ids: list[list[int]],
    rounds: int,
    steps: int,
    console: Console,
) -> Iterator[dict[tuple[str, str], Round]]:
    """Round after round of everything, by number of requests and comparison."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=2 * (rounds + 1) * len(comparisons))
        for turn in range(rounds + 1):
            found = {}
            for count in BATCH_SIZES:
                for comparison in comparisons:
                    found[str(count), comparison.name] = lockstep(
                        engines, comparison, folder, ids[:count], steps, turn
                    )
                    progress.advance(task)
            if turn:  # the first round warms up
                yield found
                console.print(f"round {turn} of {rounds}")


def lockstep(
    engines: dict[str, EngineProcess],
    comparison: Comparison,
    folder: Path,
    prompts: list[list[int]],
    steps: int,
    turn: int,
) -> Round:
    """One round: seconds of `steps` steps of each case, taken in turns; who goes first changes by round."""
    drafting = comparison.cases[-1]
    timings = folder / "draft_seconds.jsonl"
    timings.write_text("")
    planted = drafting.shape
    Control.write(folder, planted, draft_pass=drafting.draft_pass)
    last = {}
    for case in comparison.cases:
        per_step = 1 + min(case.shape.accepted, case.shape.nodes)
        limits = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 2 + (steps + 1) * per_step}
        engines[case.engine].load(prompts, [limits] * len(prompts), len(prompts))
        last[case.name] = 0.0
    order = list(last) if turn % 2 else list(last)[::-1]
    engine_of = {case.name: engines[case.engine] for case in comparison.cases}
    shape_of = {case.name: case.shape for case in comparison.cases}
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(steps + 1):
        for name in order:
            # Stock's proposer and our source read what to plant when their step ends, and only if it is new.
            if name != OFF.name and shape_of[name] != planted:
                planted = shape_of[name]
                Control.write(folder, planted, draft_pass=drafting.draft_pass)
            clock = engine_of[name].turn(0.0).clock
            seconds[name].append(clock - last[name])
            last[name] = clock
    for engine in engine_of.values():
        engine.stop()
    found = {name: values[1:] for name, values in seconds.items()}  # the first one ends the prompt
    if drafting.draft_pass:
        entries = [json.loads(line) for line in timings.read_text().splitlines()]
        found[drafting.name] = [
            entry["seconds"] for entry in entries if entry["requests"] == len(prompts)
        ][1 : steps + 1]
    return found


def prompt_ids(target: Path, prompts: list[list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of chat prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    return [
        tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for prompt in prompts
    ]


def byte_share(target: Path, checkpoint: Path) -> float:
    """Share of the target's weights that a draft pass reads: layers t..L-1, LM head (of a draft vocabulary the rows on
    its list), maps."""
    from safetensors import safe_open

    config, maps = load_checkpoint(checkpoint)
    listed = load_vocabulary(checkpoint, config)
    upper = layers = head = 0
    with safe_open(str(target / "model.safetensors"), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  not a dict
            size = math.prod(file.get_slice(name).get_shape())
            if ".layers." in name:
                layers += size
                index = int(name.split(".layers.")[1].split(".")[0])
                upper += size * (index >= config.transfer_layer)
            elif "embed_tokens" in name or "lm_head" in name:
                head = max(head, size)
    own = sum(parameter.numel() for parameter in maps.parameters())
    rows = 1.0 if listed is None else len(listed) / config.target.vocab_size
    return (upper + rows * head + own) / (layers + head)


def ratio(rounds: list[Round], one: str, other: str) -> tuple[float, float, float]:
    """Geometric mean over rounds of the median ratio of neighbouring steps, and its 95% interval."""
    logs = np.array(
        [np.median(np.log(np.array(each[one]) / np.array(each[other]))) for each in rounds]
    )
    half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
    mean = float(logs.mean())
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def report(seconds: Seconds, comparisons: list[Comparison], console: Console, share: float) -> None:
    """Print the tables: milliseconds, ratio to no speculation, ratio to the stock chain of as many rows."""
    for count, found in seconds.items():
        number = len(found[comparisons[0].name])
        table = Table(title=f"{count} request(s), median ms a step, {number} rounds")
        for column in ("step", "ms", "to no speculation", "to the stock chain of as many rows"):
            table.add_column(column)
        for comparison in comparisons:
            rounds = found[comparison.name]
            for position, case in enumerate(comparison.cases):
                others = [each.name for each in comparison.cases[:position]]
                ratios = [ratio(rounds, case.name, other) for other in others]
                texts = [f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in ratios]
                values = [value for each in rounds for value in each[case.name]]
                table.add_row(case.name, f"{1e3 * statistics.median(values):.1f}", *texts)
            table.add_section()
        console.print(table)
    console.print(f"byte share of a draft pass (upper layers, LM head, maps): {share:.0%}")


if __name__ == "__main__":
    typer.run(main)
