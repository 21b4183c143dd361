# SPDX-License-Identifier: Apache-2.0
"""`vllm-hidden-transfer demo`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_hidden_transfer.cli.failure import fail
from vllm_hidden_transfer.options import DemoDtype

EXAMPLE = Path("examples/smollm2-135m")


def demo(
    target: Annotated[Path, typer.Option(help="Folder of the target model.")] = EXAMPLE,
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
    dtype: Annotated[
        DemoDtype,
        typer.Option(
            help="What both sides compute in. In float32 the texts are the same word for word; in bfloat16 they may "
            "part where two tokens tie within its rounding, and only what is wrong fails."
        ),
    ] = "float32",
    output: Annotated[Path, typer.Option(help="Folder for logs and the picture.")] = Path(
        "work/demo"
    ),
) -> None:
    """Answer questions side by side: no speculation and hidden transfer in the same vLLM."""
    from vllm_hidden_transfer.bench.demo import DemoError, Settings, run_demo
    from vllm_hidden_transfer.bench.engine_process import EngineDiedError

    settings = Settings(
        target=target,
        checkpoint=checkpoint or target / "hidden_transfer",
        prompts=prompts,
        output=output,
        budget=budget,
        max_tokens=max_tokens,
        eager=eager,
        dtype=dtype,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
    try:
        run_demo(settings, Console(highlight=False))
    except (DemoError, EngineDiedError) as error:
        raise fail(error) from None
