# SPDX-License-Identifier: Apache-2.0
"""What a step costs: no speculation, stock's chain and our tree, in one run, interleaved.

    python scripts/step_cost.py --rounds 10

Three compiled engines stand side by side and compute in turns: no speculation, stock ``custom_class``, and ours. Both
speculating sides get the same planted drafts, of which two tokens are accepted a step. Ratios are taken round by round
and given as geometric means with 95% intervals.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
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

from vllm_hidden_transfer.evaluation.engine_process import EngineProcess, Generation
from vllm_hidden_transfer.evaluation.machine import this_machine
from vllm_hidden_transfer.evaluation.planted import ANSWERS_VARIABLE, Shape, write_answers
from vllm_hidden_transfer.evaluation.step_cost import (
    CHECKPOINT_VARIABLE,
    FOLDER_VARIABLE,
    Control,
)
from vllm_hidden_transfer.transfer import load_checkpoint

ROOT = Path(__file__).parents[1]
CHAINS = (3, 4, 8, 16)
TREES = (4, 8, 16)
STEPS = 8
MODULE = "vllm_hidden_transfer.evaluation.step_cost"


@dataclass(frozen=True)
class Case:
    """One kind of step of one engine."""

    name: str
    engine: str
    shape: Shape
    draft_pass: bool = False


CASES = [
    Case("no speculation", "off", Shape("none", 0)),
    # Next to what it is compared with, because the machine drifts.
    Case("our step without drafts", "ours", Shape("none", 0)),
    *(Case(f"stock chain {nodes}", "stock", Shape("chain", nodes)) for nodes in CHAINS),
    *(Case(f"our chain {nodes}", "ours", Shape("chain", nodes)) for nodes in TREES),
    *(Case(f"our bushy tree {nodes}", "ours", Shape("bushy", nodes)) for nodes in TREES),
    Case("draft pass", "ours", Shape("none", 0), draft_pass=True),
]


def main(
    target: Annotated[Path, typer.Option(help="the target's folder")] = ROOT
    / "examples/smollm2-135m",
    checkpoint: Annotated[Path | None, typer.Option(help="its transfer checkpoint")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="interleaved rounds")] = 10,
    case: Annotated[
        list[str] | None, typer.Option(help="only these cases beside no speculation, by name")
    ] = None,
    eager: Annotated[bool, typer.Option(help="eager engines, for a quick look")] = False,
    output: Annotated[Path, typer.Option(help="where the JSON goes")] = ROOT
    / "work/step_cost.json",
) -> None:
    """Measure step times at 1 and 8 requests and print the table."""
    cases = chosen_cases(case)
    checkpoint = checkpoint or target / "hidden_transfer"
    machine = this_machine()
    dtype = machine.dtype
    console = Console()
    described = f"{machine.model} ({machine.vector_set}), {dtype}, 2 threads"
    console.print(f"{described}, {'eager' if eager else 'compiled'}: {machine.dtype_reason}")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        names = {each.engine for each in cases}
        engines = start_engines(stack, names, folder, target, checkpoint, dtype, eager)
        seconds = measure(engines, cases, folder, target, rounds, console)
    report(seconds, cases, console, byte_share(target, checkpoint))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": described, "seconds": seconds}))
    console.print(f"raw figures: {output}")


def chosen_cases(names: list[str] | None) -> list[Case]:
    """No speculation, which all ratios are to, and the cases that were asked for."""
    known = [case.name for case in CASES]
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(f"there is no case {name!r}: the cases are {', '.join(known)}")
    return [case for case in CASES if not names or case is CASES[0] or case.name in names]


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
        CHECKPOINT_VARIABLE: str(checkpoint),
        ANSWERS_VARIABLE: str(folder / "answers.json"),
    }
    common: dict[str, Any] = {
        "model": str(target),
        "dtype": dtype,
        "enforce_eager": eager,
        "kv_cache_memory_bytes": 1 << 28,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "block_size": 32,
        "enable_prefix_caching": False,
    }
    most = max(CHAINS)
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


def measure(
    engines: dict[str, EngineProcess],
    cases: list[Case],
    folder: Path,
    target: Path,
    rounds: int,
    console: Console,
) -> dict[str, dict[str, list[float]]]:
    """Seconds a step, by number of requests and case, one value a round."""
    lines = (ROOT / "examples/prompts/unseen.jsonl").read_text().splitlines()
    prompts = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines[::6]][:8]
    params = {"temperature": 0.0, "ignore_eos": True}
    reference = engines["off"].generate(prompts, {**params, "max_tokens": 4 * STEPS})
    vocabulary = json.loads((target / "config.json").read_text())["vocab_size"]
    ids = prompt_ids(target, prompts)
    sequences = [
        [*prompt, *answer.token_ids] for prompt, answer in zip(ids, reference, strict=True)
    ]
    write_answers(folder / "answers.json", sequences, vocabulary)
    seconds: dict[str, dict[str, list[float]]] = {
        str(count): {case.name: [] for case in cases} for count in (1, 8)
    }
    timings = folder / "draft_seconds.jsonl"
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=2 * (rounds + 1) * len(cases))
        for turn in range(rounds + 1):
            for count in (1, 8):
                for case in cases if turn % 2 else cases[::-1]:
                    Control.write(folder, case.shape, draft_pass=case.draft_pass)
                    timings.write_text("")
                    per_step = 1 + min(case.shape.accepted, case.shape.nodes)
                    limits = {**params, "max_tokens": 1 + STEPS * per_step}
                    answers = engines[case.engine].generate(ids[:count], limits)
                    value = step_seconds(answers)
                    if case.draft_pass:
                        value = draft_seconds(timings, count)
                    if turn:  # the first round warms up
                        seconds[str(count)][case.name].append(value)
                    progress.advance(task)
    return seconds


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


def step_seconds(answers: list[Generation]) -> float:
    """Median time of the steps in which every request decoded."""
    start = max(answer.step_seconds[0] for answer in answers)
    end = min(answer.step_seconds[-1] for answer in answers)
    times = sorted({time for answer in answers for time in answer.step_seconds})
    inside = [time for time in times if start <= time <= end]
    return statistics.median(np.diff(inside).tolist())


def draft_seconds(path: Path, count: int) -> float:
    """Median time of the draft passes for all requests."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return statistics.median(entry["seconds"] for entry in entries if entry["requests"] == count)


def byte_share(target: Path, checkpoint: Path) -> float:
    """Share of the target's weights that a draft pass reads: layers t..L-1, LM head, maps."""
    from safetensors import safe_open

    config, maps = load_checkpoint(checkpoint)
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
    return (upper + head + own) / (layers + head)


def ratio(one: list[float], other: list[float]) -> tuple[float, float, float]:
    """Geometric mean of the ratios round by round, and its 95% interval."""
    logs = np.log(np.array(one) / np.array(other))
    half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
    mean = float(logs.mean())
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def report(
    seconds: dict[str, dict[str, list[float]]], cases: list[Case], console: Console, share: float
) -> None:
    """Print the table: milliseconds, ratio to no speculation, ratio to the stock chain of as many rows."""
    for count, found in seconds.items():
        table = Table(
            title=f"{count} request(s), median ms a step, {len(found['no speculation'])} rounds"
        )
        for column in ("step", "ms", "to no speculation", "to the stock chain of as many rows"):
            table.add_column(column)
        for case in cases:
            values = found[case.name]
            nodes = 3 if case.draft_pass else case.shape.nodes
            chain = found.get(f"stock chain {nodes}")
            ratios = [ratio(values, found["no speculation"])]
            ratios += [ratio(values, chain)] if chain is not None and case.engine == "ours" else []
            texts = [f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in ratios]
            table.add_row(case.name, f"{1e3 * statistics.median(values):.1f}", *texts)
        console.print(table)
    console.print(f"byte share of a draft pass (upper layers, LM head, maps): {share:.0%}")


if __name__ == "__main__":
    typer.run(main)
