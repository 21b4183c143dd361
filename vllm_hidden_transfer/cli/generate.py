# SPDX-License-Identifier: Apache-2.0
"""`vllm-hidden-transfer generate`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_hidden_transfer.cli.failure import fail


def generate(
    target: Annotated[str, typer.Option(help="Folder or hub id of the target.")],
    prompts: Annotated[
        list[Path],
        typer.Option(
            help="JSON lines with prompt (or messages) and, if you like, id and kind; or .txt, one "
            "prompt a line. Give it several times for several files."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="JSON lines of answers. Appended to: run again to go on.")
    ],
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            help="The prompts take turns between these; 0 is greedy. Give it several times.",
            show_default="0 and 0.8",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)] = 160,
    batch: Annotated[
        int, typer.Option(help="Prompts at once; a kill loses at most one batch.", min=1)
    ] = 100,
    limit: Annotated[
        int | None, typer.Option(help="Answer only the first prompts.", min=1, show_default="all")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bfloat16 or float16; float32 is the fast one on CPUs without AMX "
            "or AVX-512 bf16."
        ),
    ] = "auto",
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens of prompt and answer at most.", min=2, show_default="what the prompts need"
        ),
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None,
        typer.Option(
            help="Memory for the KV cache.", min=1, show_default="2 GiB on a CPU, vLLM's on a GPU"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="The n-th prompt is sampled with this seed + n.", min=0)
    ] = 20261121,
) -> None:
    """Let the target itself answer prompts, offline in stock vLLM: the best data to train maps on.

    Maps learn to guess what the target writes, so its own answers to prompts like yours teach them
    most, some greedy and some sampled. A few thousand prompts are plenty for a small target.

    Then: vllm-hidden-transfer train --target TARGET --data OUTPUT --output CHECKPOINT
    """
    from pydantic import ValidationError

    from vllm_hidden_transfer.offline.rows import DataError, first_problem
    from vllm_hidden_transfer.training import generate as generating

    options = {
        "target": target,
        "prompts": tuple(prompts),
        "output": output,
        "max_tokens": max_tokens,
        "batch": batch,
        "limit": limit,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
        "seed": seed,
    }
    if temperature:
        options["temperatures"] = tuple(temperature)
    try:
        settings = generating.GenerateSettings.model_validate(options)
        generating.generate(settings, Console(highlight=False))
    except ValidationError as error:
        raise fail(f"The options are not valid, {first_problem(error)}.") from None
    except (DataError, generating.GenerateError) as error:
        raise fail(error) from None
