# SPDX-License-Identifier: Apache-2.0
"""Compare transfer maps with their rivals: ``python -m benchmarks.rivals`` from the repository's root."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.rivals.compare import Bench, ComparisonError, Origin, compare
from benchmarks.rivals.contestants import CONTESTANTS, Sources
from benchmarks.rivals.report import write_report
from benchmarks.rivals.states import FinalStates
from vllm_hidden_transfer.checkpoint.config import one_sentence
from vllm_hidden_transfer.checkpoint.fingerprint import FingerprintError, fingerprint_target
from vllm_hidden_transfer.evaluation.preparation import progress_bar, read_answers, spread_by_group
from vllm_hidden_transfer.machine import this_commit, this_machine
from vllm_hidden_transfer.offline.rows import DataError
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.training.parallel import Processes
from vllm_hidden_transfer.training.run import Corpus, prefixes_of, read_data, target_folder
from vllm_hidden_transfer.training.settings import TrainSettings, read_settings
from vllm_hidden_transfer.training.trainer import InterruptedTraining


def main(
    answers: Annotated[
        list[Path],
        typer.Option(
            help="Answers of `vllm-hidden-transfer generate` to prompts that no drafter was trained on, greedy ones "
            "and sampled ones; give it several times for several files."
        ),
    ],
    settings: Annotated[
        Path,
        typer.Option(help="Settings of `vllm-hidden-transfer train`: target, data, batches."),
    ] = Path("examples/smollm2-135m/train.yaml"),
    minutes: Annotated[
        float,
        typer.Option(
            help="Training of each drafter, its start included, in minutes of processor time over all threads.",
            min=0.001,
        ),
    ] = 30.0,
    sweep_minutes: Annotated[
        float,
        typer.Option(help="Sweep of each drafter, all its trials together, likewise.", min=0.001),
    ] = 5.0,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Only this drafter, of {', '.join(CONTESTANTS)}; may be given several times.",
            show_default="all",
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(help="Answers to judge of each temperature, spread over the files.", min=1),
    ] = 48,
    output: Annotated[Path, typer.Option(help="Folder of rivals.md and rivals.json.")] = Path(
        "benchmarks"
    ),
) -> None:
    """Sweep, train and judge each drafter, then write the table.

    What is finished stays in rivals/ in the settings' work folder and is not done again; a training that was stopped
    goes on where it was.
    """
    console = Console(highlight=False)
    try:
        for name in only or ():
            if name not in CONTESTANTS:
                raise ComparisonError(
                    f"--only {name}: there is no such drafter, there are {', '.join(CONTESTANTS)}"
                )
        chosen = read_settings(["--config", str(settings)])
        bench = prepare(chosen, answers, limit, minutes, sweep_minutes, console)
        for name in only or CONTESTANTS:
            compare(bench, CONTESTANTS[name])
        for grid in write_report(bench.folder, output):
            console.print(grid.rich())
    except InterruptedTraining as stop:
        typer.echo(f"{stop}; the same command goes on.", err=True)
        raise typer.Exit(143) from None
    except (ValueError, OSError, DataError, FingerprintError) as error:
        typer.echo(one_sentence(str(error)), err=True)
        raise typer.Exit(1) from None


def prepare(
    settings: TrainSettings,
    answers: list[Path],
    limit: int,
    minutes: float,
    sweep_minutes: float,
    console: Console,
) -> Bench:
    """Read the data and complete what the target says of it."""
    layer = settings.transfer_layer
    if layer == "auto":
        raise ComparisonError("the settings must name a transfer_layer: auto compares nothing")
    corpus = read_data(settings, console)
    folder = target_folder(settings.target)
    fingerprint = fingerprint_target(folder)
    target = FrozenTarget.load(folder, layer, getattr(torch, settings.dtype), settings.device)
    read = read_answers(folder, answers, target.vocab_size).examples
    if not read:
        raise ComparisonError("there is no answer to judge in what --answers names")
    judged = spread_by_group(read, limit)
    everything = Corpus(corpus.train + corpus.held_out, judged)
    prefixes = prefixes_of(settings, target, everything, fingerprint, Processes(), console)
    states = FinalStates(settings.work_folder / "states", target, prefixes, fingerprint)
    examples = everything.train + judged
    missing = [example for example in examples if example.digest not in states.digests]
    with progress_bar(console) as progress:
        work = states.fill(target, missing)
        for _ in progress.track(work, total=len(missing), description="final states"):
            pass
    return Bench(
        sources=Sources(target, prefixes, states, settings.transfer_steps),
        train=corpus.train,
        held_out=corpus.held_out,
        judged=judged,
        config=settings.training(),
        folder=settings.work_folder / "rivals",
        minutes=minutes,
        sweep_minutes=sweep_minutes,
        origin=origin(),
        console=console,
    )


def origin() -> Origin:
    """This command, commit and machine."""
    return Origin(
        command=shlex.join(["python", "-m", "benchmarks.rivals", *sys.argv[1:]]),
        commit=this_commit(),
        machine=str(this_machine()),
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    typer.run(main)
