# SPDX-License-Identifier: Apache-2.0
"""`vllm-hidden-transfer train`, whose options are its settings' fields."""

import shlex

import typer
from rich.console import Console

from vllm_hidden_transfer.cli.failure import fail

PARSES_ITSELF = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
"""Context settings: pydantic reads the options, `--help` included."""


def train(context: typer.Context) -> None:
    """Train transfer maps for a target (train --help lists the options)."""
    from vllm_hidden_transfer.evaluation.preparation import missing_packages

    missing = missing_packages("scipy", "matplotlib", "pydantic_settings", "yaml")
    if missing:
        raise fail(missing)
    from vllm_hidden_transfer.training.run import RunError, train
    from vllm_hidden_transfer.training.settings import SettingsProblem, read_settings
    from vllm_hidden_transfer.training.trainer import InterruptedTraining

    command = shlex.join(["vllm-hidden-transfer", "train", *context.args])
    try:
        train(read_settings(context.args), command, Console(highlight=False))
    except InterruptedTraining as stop:
        typer.echo(f"{stop}; the same command goes on.", err=True)
        raise typer.Exit(143) from None
    except (SettingsProblem, RunError) as error:
        raise fail(error) from None
