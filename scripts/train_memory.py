# SPDX-License-Identifier: Apache-2.0
"""What training needs beside the model: peak memory on a random target as wide as an 8B model.

    python scripts/train_memory.py

A few layers of d = 4096 with a vocabulary of 128k, 64 roots x 4 steps. The most bytes that the process held, by the
kernel's count, less the target, the maps, their gradients and AdamW's state, which are stated apart: in the closed-form
start (the statistics), in forward and backward pass (activations and logits), and in the optimiser's step. One
sequence a step is computed when it is wanted, so no prefix cache is in it. Two numbers of upper layers say how much
each further one adds.
"""

from __future__ import annotations

import ctypes
import gc
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm_hidden_transfer.checkpoint.maps import TransferMaps, write_atomically
from vllm_hidden_transfer.machine import this_commit, this_machine
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import PrefixPasses
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.training.ridge import ridge_maps
from vllm_hidden_transfer.training.trainer import Trainer, TrainingConfig

GB = 1e9
ALLOWED = 2 * GB
STEPS = 4
FULL_UPPER_LAYERS = 16
"""Upper layers of an 8B model with 32 layers and the transfer in the middle."""
FITTED = 2
"""Sequences of the closed-form start; its statistics do not grow with them."""


@dataclass(frozen=True)
class Peaks:
    """The most bytes in the parts of one training step, less what is stated apart."""

    passes: int
    """Rows, forward and backward pass, clipping."""
    optimizer: int
    candidates: int
    """Tokens that the softmax ran over."""


def main(
    hidden_size: Annotated[int, typer.Option(help="Width d.", min=128)] = 4096,
    vocabulary: Annotated[int, typer.Option(help="Tokens.", min=4096)] = 128_256,
    layers: Annotated[int, typer.Option(help="Layers; all but the first take rows.", min=3)] = 4,
    roots: Annotated[int, typer.Option(help="Roots of the sequence of a step.", min=1)] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=16)] = 256,
    output: Annotated[Path, typer.Option(help="The table.")] = Path("benchmarks/train_memory.md"),
) -> None:
    """Measure, print and write the table; exits with 1 above 2 GB."""
    started, console = time.monotonic(), Console(highlight=False)
    model = random_target(hidden_size, vocabulary, layers)
    examples = random_examples(vocabulary, length)
    FrozenTarget(model, 1)  # what the libraries set up once belongs to no phase
    base = settled()
    console.print(f"the target is there, the process holds {base / GB:.2f} GB")
    target = FrozenTarget(model, layers - 1)
    reset_peak()
    maps = ridge_maps(PrefixPasses(target, 1), target, examples[:FITTED], STEPS, "token")
    most = peak()
    size = sum(parameter.numel() * parameter.element_size() for parameter in maps.parameters())
    found: dict[str, float] = {"closed-form start": most - base - size}
    console.print("the closed-form start is measured")
    apart = base + 4 * size  # maps, gradients, two moments
    few = step_peaks(FrozenTarget(model, layers - 1), examples, maps, roots, apart)
    many = step_peaks(FrozenTarget(model, 1), examples, maps, roots, apart)
    whole = step_peaks(FrozenTarget(model, 1), examples, maps, roots, apart, negatives=-1)
    upper = layers - 1
    found |= {
        f"forward and backward, 1 upper layer, {few.candidates} candidates": few.passes,
        f"forward and backward, {upper} upper layers, {many.candidates} candidates": many.passes,
        f"forward and backward, {upper} upper layers, whole vocabulary": whole.passes,
        "optimiser's step": max(peaks.optimizer for peaks in (few, many, whole)),
    }
    growth = (many.passes - few.passes) / (upper - 1)
    expected = max(many.passes, whole.passes) + (FULL_UPPER_LAYERS - upper) * growth
    apart_rows: dict[str, float] = {
        f"target, {layers} layers, bf16": sum(
            parameter.numel() * parameter.element_size() for parameter in model.parameters()
        ),
        f"maps, {size // 4 / 1e6:.0f}M parameters, fp32": size,
        "their gradients": size,
        "AdamW's state": 2 * size,
    }
    text = page(
        f"d = {hidden_size}, vocabulary {vocabulary}, {roots} roots x {STEPS} steps of one sequence of {length} tokens",
        apart_rows,
        found,
        {
            "each further upper layer": growth,
            f"forward and backward with {FULL_UPPER_LAYERS} upper layers, calculated": expected,
        },
        (time.monotonic() - started) / 60,
    )
    console.print(Markdown(text))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, text.encode())
    if max(found.values()) > ALLOWED:
        raise typer.Exit(1)


def random_target(hidden_size: int, vocabulary: int, layers: int) -> Any:
    """A random Llama with the proportions of an 8B model's layers, in bf16."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 128),
        num_key_value_heads=max(1, hidden_size // 512),
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def random_examples(vocabulary: int, length: int) -> list[Example]:
    """Sequences of which a quarter of the vocabulary is met: so many candidates a real corpus has about."""
    count = max(FITTED, vocabulary // (4 * length))
    tokens = np.random.default_rng(0).integers(0, vocabulary, (count, length)).tolist()
    return [Example(str(n), "text", None, row[:2], row[2:]) for n, row in enumerate(tokens)]


def step_peaks(
    target: FrozenTarget,
    examples: list[Example],
    maps: TransferMaps,
    roots: int,
    apart: int,
    negatives: int = 2048,
) -> Peaks:
    """Peaks of a training step; the step before it makes gradients and optimiser state."""
    settings = TrainingConfig(steps=2, sequences=1, roots=roots, negatives=negatives)
    prefixes = PrefixPasses(target, 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(target, prefixes, examples, maps, settings, folder)
        trainer.train_step()
        before_optimizer: list[int] = []

        def turn(*_: Any) -> None:
            before_optimizer.append(peak() - apart)
            reset_peak()

        trainer.optimizer.register_step_pre_hook(turn)
        settled()
        reset_peak()
        trainer.train_step()
        after = peak() - apart
    maps.zero_grad(set_to_none=True)
    sampled = len(prefixes.likely_tokens(examples)) + negatives
    return Peaks(before_optimizer[0], after, target.vocab_size if negatives < 0 else sampled)


def page(
    what: str,
    apart: dict[str, float],
    found: dict[str, float],
    derived: dict[str, float],
    minutes: float,
) -> str:
    """The page in markdown; sizes in bytes."""
    machine = this_machine()

    def lines(sizes: dict[str, float]) -> str:
        return "\n".join(f"| {name} | {size / GB:.2f} |" for name, size in sizes.items())

    verdict = "at most" if max(found.values()) <= ALLOWED else "MORE THAN"
    return f"""# Memory of training

`{shlex.join(["python", *sys.argv])}` on {machine}, {minutes:.0f} minutes, commit {this_commit()}.

{what}. GB are 10^9 bytes, resident, by the kernel's high-water mark.

| stated apart | GB |
|---|---|
{lines(apart)}

| most beside them, {verdict} {ALLOWED / GB:.0f} GB | GB |
|---|---|
{lines(found)}

| from these | GB |
|---|---|
{lines(derived)}

A step that normalises over a part of the vocabulary copies the candidates' rows of the LM head; over the whole it
copies nothing, and its logits are made for 128 rows at a time. The prefix of a step is computed when it is wanted; a
prefix cache on disk is mapped and gives its pages back when memory is short.
"""


def settled() -> int:
    """Bytes that this process holds once all that is free went back to the kernel."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def reset_peak() -> None:
    """Set the high-water mark back to what is held now (5, see `man proc`)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes that this process held since the last reset."""
    return status("VmHWM")


def status(name: str) -> int:
    """A size that the kernel keeps of this process, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


if __name__ == "__main__":
    typer.run(main)
