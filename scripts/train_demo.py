# SPDX-License-Identifier: Apache-2.0
"""Train the demo target's transfer maps: the conditioned default, the published form and the chained one.

Each is one `vllm-hidden-transfer train` with a committed configuration, on the answers of make_demo_data.py. It can
be stopped and run again. (The checkpoints that say `scripts/train_demo.py --variant ...` in their train_command.txt
were trained by this script's first form, commit 6bbc6d2.)
"""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer
from demo_target import DEFAULT_FOLDER, REPOSITORY

CONFIGURATIONS = {
    "conditioned": "train.yaml",
    "published": "published.yaml",
    "chained": "chained.yaml",
}


def main(
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Only these: conditioned, published, chained.", show_default="all"),
    ] = None,
) -> None:
    """Train the variants one after the other."""
    for name in variant or CONFIGURATIONS:
        if name not in CONFIGURATIONS:
            typer.echo(
                f"there is no variant {name!r}: the variants are {', '.join(CONFIGURATIONS)}",
                err=True,
            )
            raise typer.Exit(1)
        path = (DEFAULT_FOLDER / CONFIGURATIONS[name]).relative_to(REPOSITORY)
        command = [sys.executable, "-m", "vllm_hidden_transfer", "train", "--config", str(path)]
        status = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
        if status:
            raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
