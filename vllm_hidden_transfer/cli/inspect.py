# SPDX-License-Identifier: Apache-2.0
"""`vllm-hidden-transfer inspect`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_hidden_transfer.cli.failure import fail


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the transfer maps.")],
) -> None:
    """Show what a transfer checkpoint says about itself, its tensors, and what `eval` found."""
    from vllm_hidden_transfer.checkpoint.maps import CheckpointError, load_checkpoint
    from vllm_hidden_transfer.evaluation.inspection import checkpoint_table, print_study

    console = Console(highlight=False)
    try:
        config, maps = load_checkpoint(checkpoint)
        console.print(checkpoint_table(checkpoint, config, maps))
        print_study(checkpoint, config, console)
    except (CheckpointError, ValueError) as error:
        raise fail(error) from None
