# SPDX-License-Identifier: Apache-2.0
"""Acceptance length in the engine, on the committed unseen prompts: conditioned and published maps.

    python scripts/measure_acceptance.py

Prints a table and writes it, with the command and the machine, to benchmarks/acceptance.md.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from vllm_hidden_transfer.bench.engine_process import (
    EngineProcess,
    Generation,
    spec_counters,
)
from vllm_hidden_transfer.evaluation.acceptance import Acceptance, acceptance
from vllm_hidden_transfer.machine import this_commit, this_machine

ROOT = Path(__file__).parents[1]
KINDS = ("all", "chat", "code", "editing")
MODES = {"greedy": {"temperature": 0.0}, "temperature 0.8": {"temperature": 0.8}}


def main(
    target: Annotated[Path, typer.Option(help="the target's folder")] = ROOT
    / "examples/smollm2-135m",
    prompts: Annotated[Path, typer.Option(help="JSON lines with kind and prompt")] = ROOT
    / "examples/prompts/unseen.jsonl",
    budget: Annotated[int, typer.Option(help="nodes of a tree")] = 16,
    output: Annotated[Path, typer.Option(help="the table")] = ROOT / "benchmarks/acceptance.md",
) -> None:
    """Serve the prompts with both checkpoints, greedy and at temperature 0.8."""
    machine, commit, console = this_machine(), this_commit(), Console()
    questions = [json.loads(line) for line in prompts.read_text().splitlines()]
    rows: list[str] = []
    for name, folder in (
        ("token-conditioned, one pass", target / "hidden_transfer"),
        ("as published, one pass", target / "hidden_transfer/published"),
    ):
        options = {
            "model": str(target),
            "dtype": machine.dtype,
            "enforce_eager": True,
            # Scratch for tree paths is an eighth of it: with less, 16 requests have their trees cut.
            "kv_cache_memory_bytes": 1 << 32,
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "speculative_config": {
                "method": "hidden_transfer",
                "model": str(folder),
                "num_speculative_tokens": budget,
                "always_draft": True,
            },
        }
        log = ROOT / "work/acceptance" / f"{folder.name}.log"
        with EngineProcess(name, options, log, {"OMP_NUM_THREADS": "2"}) as engine:
            for mode, sampling in MODES.items():
                console.print(f"{name}, {mode} ...")
                before = spec_counters(engine.metrics())
                chats = [[{"role": "user", "content": item["prompt"]}] for item in questions]
                each = [
                    {**sampling, "max_tokens": 96, "seed": index} for index in range(len(chats))
                ]
                answers = engine.generate(chats, each)
                counters = spec_counters(engine.metrics()) - before
                depths = [f"{n / counters.drafts:.2f}" for n in counters.accepted_per_depth[:4]]
                found = by_kind([item["kind"] for item in questions], answers)
                cells = [str(found[kind]) for kind in KINDS]
                nodes = counters.draft_tokens / counters.drafts
                cells += [f"{found['all'].repeated:.0%}", f"{nodes:.1f}", ", ".join(depths)]
                rows.append(f"| {name} | {mode} | " + " | ".join(cells) + " |")
    table = "\n".join([*header(), *rows])
    command = shlex.join(["python", *sys.argv])
    text = f"""# Acceptance length in the engine

`{command}` on {machine}, {machine.dtype}, commit {commit}.

{len(questions)} prompts of `{prompts.name}`, used neither for training nor for calibration, at most 96 tokens,
end of text respected, trees of up to {budget} nodes. Output tokens after the first per decode pass, summed over
requests, with 95% bootstrap intervals over requests; 1.00 is no speculation.

{table}
"""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    console.print(Markdown(text))


def header() -> list[str]:
    """The first two lines of the table."""
    titles = [
        "maps",
        "decoding",
        *KINDS,
        "repeated 4-grams",
        "nodes a draft",
        "accepted at depth 1 to 4",
    ]
    return ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]


def by_kind(kinds: list[str], answers: list[Generation]) -> dict[str, Acceptance]:
    """Acceptance over all prompts and over each kind of prompt."""
    groups: dict[str, list[Generation]] = defaultdict(list)
    for kind, answer in zip(kinds, answers, strict=True):
        if answer.passes:
            groups[kind].append(answer)
            groups["all"].append(answer)
    return {
        kind: acceptance(
            [answer.decoded for answer in group],
            [answer.passes for answer in group],
            [answer.token_ids for answer in group],
        )
        for kind, group in groups.items()
    }


if __name__ == "__main__":
    typer.run(main)
