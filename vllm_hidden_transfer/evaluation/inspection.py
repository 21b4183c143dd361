# SPDX-License-Identifier: Apache-2.0
"""A transfer checkpoint for people's eyes. Loads without vLLM."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_hidden_transfer.checkpoint.config import TransferConfig
from vllm_hidden_transfer.checkpoint.maps import TransferMaps
from vllm_hidden_transfer.checkpoint.vocabulary import load_vocabulary
from vllm_hidden_transfer.evaluation.study_report import read_study, study_grids


def checkpoint_table(folder: Path, config: TransferConfig, maps: TransferMaps) -> Table:
    """Everything a user wants to know before serving with it.

    Raises:
        CheckpointError: the list of its draft vocabulary is damaged or does not fit.
    """
    target = config.target
    listed = load_vocabulary(folder, config)
    verifier = config.speculators_config.verifier
    table = Table(title=str(folder), show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "target": f"{verifier.name_or_path} ({', '.join(verifier.architectures)})",
        "target's shape": f"{target.num_hidden_layers} layers, hidden size {target.hidden_size}, "
        f"vocabulary {target.vocab_size}",
        "target's fingerprint": target.fingerprint,
        "transfer steps k": str(config.num_transfer_steps),
        "transfer layer t": f"{config.transfer_layer} of {target.num_hidden_layers}",
        "conditioning": config.conditioning,
        "bigram re-weighting": f"rank {config.bigram_rank}" if config.bigram_rank else "none",
        "draft vocabulary": "all tokens"
        if listed is None
        else f"{len(listed)} tokens and each request's own",
        "temperatures": ", ".join(f"{value:.3f}" for value in config.calibration.temperatures),
        "node budget": str(config.tree.node_budget),
    }
    for name, value in rows.items():
        table.add_row(name, value, end_section=name == "node budget")
    total = 0
    for name, tensor in maps.named_parameters():
        size = tensor.numel() * tensor.element_size()
        total += tensor.numel()
        dtype = str(tensor.dtype).removeprefix("torch.")
        table.add_row(name, f"{list(tensor.shape)} {dtype}, {size / 1e6:.1f} MB")
    table.add_row("parameters", f"{total / 1e6:.2f} million")
    return table


def print_study(folder: Path, config: TransferConfig, console: Console) -> None:
    """The tables of the study that lies in the folder (``eval.json``); nothing where there is none.

    It says so where `tune` or `vocabulary` has changed the checkpoint since.

    Raises:
        CheckpointError: the list of its draft vocabulary is damaged or does not fit.
        ValueError: eval.json cannot be used; the message is one sentence.
    """
    study = read_study(folder)
    if study is None:
        return
    listed = load_vocabulary(folder, config)
    now = (
        list(config.calibration.temperatures),
        config.tree.node_budget,
        None if listed is None else len(listed),
    )
    if (study.temperatures, study.node_budget, study.draft_vocabulary) != now:
        console.print(
            "\nThe study below was made with other temperatures, another node budget or another draft vocabulary than "
            "the checkpoint has now: make a new one with `vllm-hidden-transfer eval`.",
            soft_wrap=True,
        )
    for grid in study_grids(study):
        console.print()
        console.print(grid.rich())
    source = study.provenance
    console.print(f"\n$ {source.command}\n{source.machine}", soft_wrap=True, markup=False)
