# SPDX-License-Identifier: Apache-2.0
"""How a command ends that cannot do what it was asked."""

import typer
from rich.console import Console


def fail(message: object) -> typer.Exit:
    """One red sentence on stderr and exit status 1: raise what this returns."""
    Console(stderr=True, highlight=False).print(
        str(message), style="red", markup=False, soft_wrap=True
    )
    return typer.Exit(1)
