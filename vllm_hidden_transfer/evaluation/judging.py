# SPDX-License-Identifier: Apache-2.0
"""The commands `eval` and `tune` from beginning to end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from vllm_hidden_transfer.checkpoint.maps import write_atomically
from vllm_hidden_transfer.drafting.lookup import SHARES
from vllm_hidden_transfer.evaluation.preparation import (
    JudgingError,
    Prepared,
    Request,
    prepare,
    progress_bar,
)
from vllm_hidden_transfer.evaluation.study import (
    OPENING_TOKENS,
    Judged,
    draft_with_maps,
    judge,
    maps_drafter,
    provenance,
)
from vllm_hidden_transfer.evaluation.study_plots import draw_study
from vllm_hidden_transfer.evaluation.study_report import study_grids, study_markdown
from vllm_hidden_transfer.evaluation.study_result import STUDY_FILE, Study
from vllm_hidden_transfer.evaluation.tuning import StepCosts, tune, tuning_grids, write_settings

REPORT_FILE = "eval.md"


def run_eval(request: Request, output: Path, command: str, console: Console) -> None:
    """Judge a checkpoint, show the tables, and write eval.json, eval.md and pictures into `output`.

    Raises:
        JudgingError: something is missing or does not fit.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with progress_bar(console) as progress:
            prepared = prepare(request, console, progress)
            study = study_of(request, prepared, command, progress)
        write_study(study, output)
    except (OSError, ValueError) as error:
        raise JudgingError(error) from error
    for grid in study_grids(study):
        console.print()
        console.print(grid.rich())
    console.print(
        f"\nwritten to {output}: {STUDY_FILE}, {REPORT_FILE} and pictures", soft_wrap=True
    )


def study_of(request: Request, prepared: Prepared, command: str, progress: Progress) -> Study:
    """The whole study."""
    config = prepared.config
    temperatures = list(config.calibration.temperatures)
    parts = (prepared.target, prepared.prefixes, prepared.maps)
    vocabulary = prepared.vocabulary
    drafts = draft_with_maps(*parts, prepared.answers, progress, vocabulary)
    drafter = maps_drafter(*parts, drafts, temperatures, vocabulary, SHARES)
    return Study(
        provenance=provenance(
            command,
            request.target,
            prepared.fingerprint,
            request.checkpoint,
            prepared.trained_for_this_target,
            prepared.answers,
        ),
        conditioning=config.conditioning,
        num_transfer_steps=config.num_transfer_steps,
        transfer_layer=config.transfer_layer,
        temperatures=temperatures,
        node_budget=config.tree.node_budget,
        draft_vocabulary=None if vocabulary is None else len(vocabulary.listed),
        max_tokens=request.max_tokens,
        opening_tokens=OPENING_TOKENS,
        groups=judge(Judged(drafts, drafter, temperatures), config.tree.node_budget, progress),
    )


def write_study(study: Study, folder: Path) -> None:
    """Pictures first: eval.md names them, and eval.json says that all is there."""
    pictures = draw_study(study, folder)
    write_atomically(folder / REPORT_FILE, study_markdown(study, pictures).encode())
    write_atomically(folder / STUDY_FILE, (study.model_dump_json(indent=1) + "\n").encode())


def run_tune(request: Request, costs: StepCosts | None, console: Console) -> None:
    """Fit the checkpoint's settings, show what they changed, and write them.

    Raises:
        JudgingError: something is missing or does not fit.
    """
    try:
        with progress_bar(console) as progress:
            prepared = prepare(request, console, progress)
            tuned = tune(prepared, costs, progress)
        write_settings(request.checkpoint, prepared.config, tuned.after)
    except (OSError, ValueError) as error:
        raise JudgingError(error) from error
    for grid in tuning_grids(tuned):
        console.print()
        console.print(grid.rich())
    console.print(f"\nwritten to {request.checkpoint}/config.json", soft_wrap=True)
