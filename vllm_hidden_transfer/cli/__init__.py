# SPDX-License-Identifier: Apache-2.0
"""The command `vllm-hidden-transfer`, a file a command. Nothing imports this; heavy imports wait for their command."""

import typer

from vllm_hidden_transfer.cli.bench import bench
from vllm_hidden_transfer.cli.demo import demo
from vllm_hidden_transfer.cli.evaluate import evaluate
from vllm_hidden_transfer.cli.fix_vllm_cpu import fix_vllm_cpu
from vllm_hidden_transfer.cli.generate import generate
from vllm_hidden_transfer.cli.inspect import inspect
from vllm_hidden_transfer.cli.train import PARSES_ITSELF, train
from vllm_hidden_transfer.cli.tune import tune
from vllm_hidden_transfer.cli.vocabulary import vocabulary

app = typer.Typer(
    help="Hidden transfer for vLLM: the target drafts from its own hidden states.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(demo)
app.command()(bench)
app.command()(generate)
app.command(context_settings=PARSES_ITSELF)(train)
app.command()(inspect)
app.command("eval")(evaluate)
app.command()(tune)
app.command()(vocabulary)
app.command("fix-vllm-cpu")(fix_vllm_cpu)


def main() -> None:
    """What the console script runs."""
    app()
