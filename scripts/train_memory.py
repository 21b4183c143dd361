# SPDX-License-Identifier: Apache-2.0
"""What training needs beside the model: peak memory on a random target of the size of an 8B model's layers.

    python scripts/train_memory.py

Two layers of d = 4096 with a vocabulary of 128k, 64 roots x 4 steps. Beside the target, the maps, their gradients and
their optimiser state (stated apart) it reports the most that a phase held: the statistics of the ridge start, and
activations, logits and gradients of a step.
"""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm_hidden_transfer.training.cache import Example
from vllm_hidden_transfer.training.prefixes import PrefixPasses
from vllm_hidden_transfer.training.ridge import ridge_maps
from vllm_hidden_transfer.training.target import FrozenTarget
from vllm_hidden_transfer.training.trainer import Trainer, TrainingConfig

GB = 1e9
STEPS = 4


def main(
    hidden_size: Annotated[int, typer.Option(help="d")] = 4096,
    vocabulary: Annotated[int, typer.Option(help="tokens")] = 128_256,
    layers: Annotated[int, typer.Option(help="layers; the upper half takes the rows")] = 4,
    roots: Annotated[int, typer.Option(help="roots of one sequence")] = 64,
    length: Annotated[int, typer.Option(help="tokens of the sequence")] = 256,
) -> None:
    """Measure and print the table; exits with 1 above 2 GB."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=max(1, hidden_size // 512),
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    target = FrozenTarget(model, layers // 2)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, length)).tolist()
    examples = [Example(str(n), "text", None, row[:2], row[2:]) for n, row in enumerate(tokens)]
    prefixes = PrefixPasses(target, 1)
    base = resident()
    with watched() as ridge:
        maps = ridge_maps(prefixes, target, examples, STEPS, "token")
    own = sum(parameter.numel() * parameter.element_size() for parameter in maps.parameters())
    settings = TrainingConfig(steps=2, sequences=1, roots=roots)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(target, prefixes, examples, maps, settings, Path(folder))
        trainer.train_step()  # makes gradients and optimiser state
        held = resident()
        with watched() as step:
            trainer.train_step()
    rows = {
        "target (bf16)": sum(p.numel() * p.element_size() for p in model.parameters()),
        "maps, gradients and AdamW's state (fp32)": 4 * own,
        "most beside them, ridge start": ridge.peak - base - own,
        "most beside them, a training step": step.peak - held,
    }
    table = Table(
        title=f"d = {hidden_size}, vocabulary {vocabulary}, {roots} roots x {STEPS} steps"
    )
    table.add_column("what")
    table.add_column("GB", justify="right")
    for name, size in rows.items():
        table.add_row(name, f"{size / GB:.2f}")
    Console().print(table)
    if max(ridge.peak - base - own, step.peak - held) > 2 * GB:
        raise typer.Exit(1)


def resident() -> int:
    """Bytes that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class watched:  # noqa: N801  reads as a phrase
    """The most bytes that this process held inside the block, as the kernel counts them."""

    def __enter__(self) -> watched:
        # Writing 5 sets the high-water mark back to what is held now (man proc).
        Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *error: object) -> None:
        status = Path("/proc/self/status").read_text()
        self.peak = int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    torch.set_num_threads(2)
    typer.run(main)
