# SPDX-License-Identifier: Apache-2.0
"""`vllm-hidden-transfer vocabulary`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_hidden_transfer.cli.failure import fail
from vllm_hidden_transfer.cli.judging_options import CheckpointFolder, TargetFolder


def vocabulary(
    target: TargetFolder,
    checkpoint: CheckpointFolder,
    data: Annotated[
        list[Path],
        typer.Option(
            help="Answers of `generate`, chats or text; may be given several times. "
            "Use what looks like what you serve, and not what you judge on.",
        ),
    ],
    size: Annotated[int, typer.Option(help="Tokens on the list.", min=1)] = 16384,
) -> None:
    """Let a checkpoint draft from the tokens that the target uses most: a smaller part of the LM head is read."""
    from vllm_hidden_transfer.evaluation.preparation import JudgingError
    from vllm_hidden_transfer.evaluation.vocabulary import write_vocabulary

    try:
        write_vocabulary(target, checkpoint, data, size, Console(highlight=False))
    except JudgingError as error:
        raise fail(error) from None
