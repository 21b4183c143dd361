# SPDX-License-Identifier: Apache-2.0
"""`vllm-hidden-transfer tune`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_hidden_transfer.cli.failure import fail
from vllm_hidden_transfer.cli.judging_options import (
    AllowMismatch,
    Answers,
    CheckpointFolder,
    DeviceName,
    Dtype,
    HeldOut,
    Limit,
    MaxTokens,
    TargetFolder,
)


def tune(
    target: TargetFolder,
    checkpoint: CheckpointFolder,
    data: Answers,
    max_tokens: MaxTokens = 96,
    limit: Limit = 100,
    row_cost: Annotated[
        float | None,
        typer.Option(help="Cost of one more verified row, as a share of a one-row step.", min=0),
    ] = None,
    draft_cost: Annotated[
        float | None,
        typer.Option(help="Cost of a draft pass, as a share of a one-row step.", min=0),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the target's states over the answers.",
            show_default="a temporary one",
        ),
    ] = None,
    held_out: HeldOut = False,
    allow_target_mismatch: AllowMismatch = False,
    dtype: Dtype = "float32",
    device: DeviceName = "cpu",
) -> None:
    """Fit a checkpoint's calibration, and its tree size where the costs are given, and write them."""
    from tempfile import TemporaryDirectory

    from vllm_hidden_transfer.evaluation.preparation import (
        JudgingError,
        Request,
        missing_packages,
    )

    missing = missing_packages("scipy", "matplotlib")
    if missing:
        raise fail(missing)
    if (row_cost is None) != (draft_cost is None):
        raise fail("--row-cost and --draft-cost make a choice of tree size together: give both.")
    from vllm_hidden_transfer.evaluation.judging import run_tune
    from vllm_hidden_transfer.evaluation.tuning import StepCosts

    costs = None
    if row_cost is not None and draft_cost is not None:
        costs = StepCosts(row=row_cost, draft=draft_cost)
    with TemporaryDirectory(prefix="vllm-hidden-transfer-") as temporary:
        request = Request(
            target=target,
            checkpoint=checkpoint,
            data=data,
            cache=cache or Path(temporary),
            max_tokens=max_tokens,
            limit=limit,
            held_out=held_out,
            allow_target_mismatch=allow_target_mismatch,
            dtype=dtype,
            device=device,
        )
        try:
            run_tune(request, costs, Console(highlight=False))
        except JudgingError as error:
            raise fail(error) from None
