# SPDX-License-Identifier: Apache-2.0
"""Let the demo target answer the training prompts: the data that the demo maps learn from.

The prompts are written to a file and `vllm-hidden-transfer generate` answers them in fp32, even ones
greedily, odd ones at temperature 0.8. An interrupted run goes on where it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from demo_prompts import training_prompts
from demo_target import DEFAULT_FOLDER, REPOSITORY
from rich.console import Console

from vllm_hidden_transfer.offline.rows import DataError
from vllm_hidden_transfer.training.generate import GenerateError, GenerateSettings, generate

SEED = 20261121
DEFAULT_OUTPUT = REPOSITORY / "work" / "demo_data.jsonl"


def write_prompts(path: Path, count: int) -> None:
    """The first `count` training prompts as `generate` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": prompt.id, "kind": prompt.kind, "prompt": prompt.text}
        for prompt in training_prompts(count, SEED)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(
    count: Annotated[int, typer.Option(help="Training prompts to answer.")] = 1620,
    answer_tokens: Annotated[int, typer.Option(help="Tokens per answer at most.")] = 160,
    batch: Annotated[int, typer.Option(help="Prompts per batch, and requests at once.")] = 100,
    target: Annotated[Path, typer.Option(help="The demo target.")] = DEFAULT_FOLDER,
    output: Annotated[Path, typer.Option(help="JSONL to append to.")] = DEFAULT_OUTPUT,
) -> None:
    """Write the target's own answers to the training prompts."""
    prompts = output.with_suffix(".prompts.jsonl")
    settings = GenerateSettings(
        target=str(target),
        prompts=(prompts,),
        output=output,
        temperatures=(0.0, 0.8),
        max_tokens=answer_tokens,
        batch=batch,
        dtype="float32",
        max_model_len=1024,
        kv_cache_memory_bytes=3 << 30,
        seed=SEED,
    )
    try:
        write_prompts(prompts, count)
        generate(settings, Console(highlight=False))
    except (DataError, GenerateError, OSError, ValueError) as error:
        typer.echo(f"demo data: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
