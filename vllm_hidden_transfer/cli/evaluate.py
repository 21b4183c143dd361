# SPDX-License-Identifier: Apache-2.0
"""`vllm-hidden-transfer eval`."""

import shlex
import sys
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


def evaluate(
    target: TargetFolder,
    checkpoint: CheckpointFolder,
    data: Answers,
    output: Annotated[Path, typer.Option(help="Folder for eval.json, eval.md and pictures.")],
    max_tokens: MaxTokens = 96,
    limit: Limit = 100,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the target's states over the answers, kept for the next time.",
            show_default="prefixes in the output folder",
        ),
    ] = None,
    held_out: HeldOut = False,
    allow_target_mismatch: AllowMismatch = False,
    dtype: Dtype = "float32",
    device: DeviceName = "cpu",
) -> None:
    """Acceptance study of a checkpoint on recorded answers, without an engine and its noise."""
    from vllm_hidden_transfer.evaluation.preparation import (
        JudgingError,
        Request,
        missing_packages,
    )

    missing = missing_packages("scipy", "matplotlib")
    if missing:
        raise fail(missing)
    from vllm_hidden_transfer.evaluation.judging import run_eval

    request = Request(
        target=target,
        checkpoint=checkpoint,
        data=data,
        cache=cache or output / "prefixes",
        max_tokens=max_tokens,
        limit=limit,
        held_out=held_out,
        allow_target_mismatch=allow_target_mismatch,
        dtype=dtype,
        device=device,
    )
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    try:
        run_eval(request, output, command, Console(highlight=False))
    except JudgingError as error:
        raise fail(error) from None
