# SPDX-License-Identifier: Apache-2.0
"""Options that `eval` and `tune` share."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_hidden_transfer.options import Device, TargetDtype

TargetFolder = Annotated[Path, typer.Option(help="Folder of the target model.")]
CheckpointFolder = Annotated[Path, typer.Option(help="Folder of the transfer maps.")]
Answers = Annotated[
    list[Path],
    typer.Option(
        help="Answers of `generate`, chats or text; may be given several times. "
        "Use what the maps were not trained on, or --held-out.",
    ),
]
Limit = Annotated[
    int,
    typer.Option(
        help="Answers judged at most of each sort (greedy, each temperature, other text), "
        "evenly spread over the data.",
        min=1,
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Output tokens judged of each answer.", min=2)]
HeldOut = Annotated[
    bool, typer.Option("--held-out", help="Only the answers that `train` keeps out of training.")
]
AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-target-mismatch", help="Judge maps that were trained for other weights too."
    ),
]
Dtype = Annotated[
    TargetDtype,
    typer.Option(help="The target's dtype; what it is served in tells most."),
]
DeviceName = Annotated[Device, typer.Option(help="Where it runs; cuda was never run by us.")]
