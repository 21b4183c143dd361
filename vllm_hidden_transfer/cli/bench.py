# SPDX-License-Identifier: Apache-2.0
"""`vllm-hidden-transfer bench`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_hidden_transfer.cli.demo import EXAMPLE
from vllm_hidden_transfer.cli.failure import fail
from vllm_hidden_transfer.options import DemoDtype


def bench(
    target: Annotated[Path, typer.Option(help="Folder of the target model.")] = EXAMPLE,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the transfer maps.",
            show_default="hidden_transfer in the target's folder",
        ),
    ] = None,
    prompts: Annotated[
        Path,
        typer.Option(help="JSON lines with id, kind and prompt: such as your users ask."),
    ] = Path("examples/prompts/unseen.jsonl"),
    side: Annotated[
        list[str] | None,
        typer.Option(
            help="What to compare with no speculation: default (ours as it comes), maps, always (drafting at every "
            "step), text (ours without maps), n-gram and suffix (vLLM's own). Give it several times.",
            show_default="default, text, n-gram, and suffix where its package is installed",
        ),
    ] = None,
    requests: Annotated[
        list[int] | None,
        typer.Option(
            help="Requests at a time. Give it several times.", min=1, show_default="1, 4, 16"
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="Kinds of prompts, each for itself, or mixed. Give it several times.",
            show_default="mixed",
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="0 is greedy. Give it several times.", min=0.0, show_default="0"),
    ] = None,
    windows: Annotated[int, typer.Option(help="Pairs of measurements of each.", min=2)] = 10,
    window_tokens: Annotated[
        int, typer.Option(help="Tokens of a window, for each request at a time.", min=1)
    ] = 64,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=2)] = 96,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Take fewer windows where this is too short, at least three of each.",
            min=0.0,
            show_default="as long as it takes",
        ),
    ] = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="Start all engines without compiling.")
    ] = False,
    dtype: Annotated[DemoDtype, typer.Option(help="What all engines compute in.")] = "float32",
    max_model_len: Annotated[
        int, typer.Option(help="Tokens of prompt and answer at most.", min=2)
    ] = 2048,
    kv_cache_memory_bytes: Annotated[
        int, typer.Option(help="Memory for the KV cache of each engine.", min=1)
    ] = 512 << 20,
    output: Annotated[
        Path, typer.Option(help="Folder for logs, the JSON and the picture. Run again to go on.")
    ] = Path("work/bench"),
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what the folder holds.")
    ] = False,
) -> None:
    """Measure what speculation is worth here: ratios to no speculation by number of requests, of ours and vLLM's own.

    The engines stand side by side in one vLLM and take turns on the same load. A ratio under 1 is a loss.
    """
    from vllm_hidden_transfer.bench import compare
    from vllm_hidden_transfer.bench.engine_process import EngineDiedError

    checkpoint = checkpoint or target / "hidden_transfer"
    sides = tuple(dict.fromkeys(side or compare.usual_sides()))
    known = compare.all_sides(checkpoint)
    for name in sides:
        if name not in known:
            raise fail(f"There is no side {name!r}: give one of {', '.join(known)} for --side.")
    if not (target / "config.json").is_file():
        raise fail(f"There is no target in {target}: give its folder with --target.")
    settings = compare.Settings(
        target=target,
        checkpoint=checkpoint,
        prompts=prompts,
        sides=sides,
        requests=tuple(dict.fromkeys(requests or (1, 4, 16))),
        kinds=tuple(dict.fromkeys(kind or (compare.MIXED,))),
        temperatures=tuple(dict.fromkeys(temperature or (0.0,))),
        windows=windows,
        window_tokens=window_tokens,
        max_tokens=max_tokens,
        dtype=dtype,
        eager=eager,
        max_model_len=max_model_len,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
    )
    if restart:
        (output / "bench.json").unlink(missing_ok=True)
    try:
        compare.run_bench(settings, output, Console(highlight=False), minutes)
    except (compare.BenchError, EngineDiedError) as error:
        raise fail(error) from None
    except KeyboardInterrupt:
        raise fail(
            f"Stopped; what was measured is in {output / 'bench.json'}: run the same command again to go on."
        ) from None
