# SPDX-License-Identifier: Apache-2.0
"""Train the demo target's transfer maps: the conditioned default and the published form.

One command makes both checkpoints from ``work/demo_data.jsonl`` (see make_demo_data.py). It can be
stopped and run again: the prefix cache, the optimiser and the log go on where they were.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from demo_target import DEFAULT_FOLDER, REPOSITORY
from rich.console import Console
from rich.progress import track

from vllm_hidden_transfer.config import (
    Calibration,
    Conditioning,
    SpeculatorsConfig,
    Target,
    TransferConfig,
    Verifier,
)
from vllm_hidden_transfer.evaluation.offline import Drafts, calibrate, draft, walk
from vllm_hidden_transfer.fingerprint import fingerprint_target
from vllm_hidden_transfer.training.cache import (
    Example,
    PrefixCache,
    is_held_out,
    read_examples,
)
from vllm_hidden_transfer.training.ridge import (
    collect_moments,
    ridge_maps,
)
from vllm_hidden_transfer.training.target import FrozenTarget
from vllm_hidden_transfer.training.trainer import (
    InterruptedTraining,
    Trainer,
    TrainingConfig,
)
from vllm_hidden_transfer.transfer import (
    CheckpointError,
    TransferMaps,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)

VERIFIER = "HuggingFaceTB/SmolLM2-135M-Instruct"
VARIANTS: dict[str, tuple[Conditioning, str]] = {
    "conditioned": ("token", ""),
    "published": ("none", "published"),
}

console = Console(highlight=False)


def main(
    data: Annotated[Path, typer.Option(help="The target's own answers.")] = REPOSITORY
    / "work"
    / "demo_data.jsonl",
    target_folder: Annotated[Path, typer.Option("--target", help="The target.")] = DEFAULT_FOLDER,
    output: Annotated[Path, typer.Option(help="Where the checkpoints go.")] = DEFAULT_FOLDER
    / "hidden_transfer",
    work: Annotated[Path, typer.Option(help="Cache and training state.")] = REPOSITORY / "work",
    variant: Annotated[list[str] | None, typer.Option(help="Only these variants.")] = None,
    layer: Annotated[int, typer.Option(help="Transfer layer t.")] = 20,
    transfer_steps: Annotated[int, typer.Option(help="Transfer steps k.")] = 4,
    steps: Annotated[int, typer.Option(help="Optimiser steps; 0 keeps the ridge start.")] = 450,
    sequences: Annotated[int, typer.Option(help="Sequences per step.")] = 16,
    roots: Annotated[int, typer.Option(help="Roots per sequence.")] = 6,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 8e-4,
    max_examples: Annotated[int, typer.Option(help="Use the first examples only.")] = 100_000,
    judged: Annotated[int, typer.Option(help="Held-out answers to calibrate and judge on.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of batches and roots.")] = 20261121,
    go_on: Annotated[
        bool, typer.Option(help="Start from the checkpoints in --output, not from ridge.")
    ] = False,
) -> None:
    """Train both variants and write their checkpoints."""
    try:
        fingerprint = fingerprint_target(target_folder)
        target = FrozenTarget.load(target_folder, layer)
        examples = read_examples(data)[:max_examples]
        cache = PrefixCache(work / "cache", target, fingerprint)
        missing = [e for e in examples if e.digest not in cache.digests]
        for _ in track(cache.fill(target, missing), "prefix cache", total=len(missing)):
            pass
        train = [e for e in examples if not is_held_out(e)]
        held_out = _balanced([e for e in examples if is_held_out(e)], judged)
        if not train or not held_out:
            raise ValueError(f"{data} has too few answers: run make_demo_data.py first")
        count = sum(len(e.answer) for e in train)
        console.print(f"{len(train)} training answers, {count} tokens; {len(held_out)} held out")
        moments = collect_moments(cache, target, train, transfer_steps)
        for name in variant or list(VARIANTS):
            conditioning, folder = VARIANTS[name]
            if go_on:
                maps = load_checkpoint(output / folder)[1]
            else:
                maps = ridge_maps(moments, target.hidden_size, conditioning)
            config = TrainingConfig(
                steps=max(steps, 1),
                sequences=sequences,
                roots=roots,
                learning_rate=learning_rate,
                seed=seed,
            )
            # A second round is a run of its own: another schedule, often more data.
            state = work / "train" / (f"{name}-{len(train)}-{steps}" if go_on else name)
            started = time.monotonic()
            if steps:
                maps = _train(target, cache, train, maps, config, state)
            figures = _export(target, cache, held_out, maps, output / folder, layer, fingerprint)
            figures |= {
                "variant": name,
                "training_answers": len(train),
                "training_answer_tokens": count,
                "data_sha256": hashlib.sha256(
                    "".join(e.digest for e in examples).encode()
                ).hexdigest(),
                "settings": config.model_dump() | {"steps": steps},
                "minutes_this_run": round((time.monotonic() - started) / 60, 1),
            }
            log = state / "log.jsonl" if steps else None
            _document(output / folder, figures, log, append=go_on)
            console.print(f"{name}: {json.dumps(figures['judged'])}")
    except InterruptedTraining as stop:
        typer.echo(f"train: {stop}; the same command goes on.", err=True)
        raise typer.Exit(143) from stop
    except (OSError, ValueError, CheckpointError) as error:
        typer.echo(f"train: {error}", err=True)
        raise typer.Exit(1) from error


def _balanced(examples: list[Example], count: int) -> list[Example]:
    """`count` examples, half of them greedy where there are enough."""
    greedy = [e for e in examples if e.temperature == 0.0]
    sampled = [e for e in examples if e.temperature > 0.0]
    half = min(len(greedy), count // 2)
    return greedy[:half] + sampled[: count - half]


def _train(
    target: FrozenTarget,
    cache: PrefixCache,
    train: list[Example],
    maps: TransferMaps,
    config: TrainingConfig,
    state: Path,
) -> TransferMaps:
    trainer = Trainer(target, cache, train, maps, config, state)
    if trainer.step:
        console.print(f"going on at step {trainer.step}")
    trainer.run()
    return trainer.maps


def _export(
    target: FrozenTarget,
    cache: PrefixCache,
    held_out: list[Example],
    maps: TransferMaps,
    folder: Path,
    layer: int,
    fingerprint: str,
) -> dict[str, Any]:
    """Calibrate, judge and save; returns the figures."""
    # Judge what is stored: the maps rounded to bf16.
    maps = maps.bfloat16().float().requires_grad_(False)
    drafts: list[Drafts] = [
        draft(target, cache, maps, example)
        for example in track(held_out, "calibrating and judging")
    ]
    temperatures = calibrate(drafts)
    config = TransferConfig(
        speculators_config=SpeculatorsConfig(
            verifier=Verifier(name_or_path=VERIFIER, architectures=tuple(target.architectures))
        ),
        num_transfer_steps=maps.num_steps,
        transfer_layer_ids=(layer,),
        conditioning=maps.conditioning,
        calibration=Calibration(temperatures=tuple(temperatures)),
        target=Target(
            hidden_size=target.hidden_size,
            num_hidden_layers=target.num_layers,
            vocab_size=target.vocab_size,
            fingerprint=fingerprint,
        ),
    )
    save_checkpoint(folder, config, maps)
    judged: dict[str, Any] = {}
    for label, greedy in (("greedy", True), ("temperature 0.8", False)):
        chosen = [d for d in drafts if (d.example.temperature == 0.0) == greedy]
        if chosen:
            found = walk(chosen, temperatures, config.tree.node_budget)
            judged[label] = {
                "answers": len(chosen),
                "acceptance_length": round(found.length, 3),
                "accepted_by_depth": found.by_depth,
                "top1_by_depth": found.accuracy,
            }
    return {"temperatures": temperatures, "judged": judged}


def _document(folder: Path, figures: dict[str, Any], log: Path | None, append: bool) -> None:
    """Model card, command and log beside the weights."""
    command = "python scripts/train_demo.py " + " ".join(map(shlex.quote, sys.argv[1:]))
    commands = ["python scripts/demo_target.py", "python scripts/make_demo_data.py"]
    records = log.read_text().splitlines() if log is not None and log.exists() else []
    command_file, log_file = folder / "train_command.txt", folder / "training_log.jsonl"
    if append:
        commands = command_file.read_text().splitlines()
        records = log_file.read_text().splitlines() + records
    commands.append(command.strip())
    write_atomically(command_file, "".join(line + "\n" for line in commands).encode())
    write_atomically(log_file, "".join(line + "\n" for line in records).encode())
    last = json.loads(records[-1]) if records else None
    rows = "\n".join(
        f"| {label} | {f['answers']} | {f['acceptance_length']:.2f} | "
        f"{' / '.join(f'{x:.2f}' for x in f['accepted_by_depth'])} | "
        f"{' / '.join(f'{x:.2f}' for x in f['top1_by_depth'])} |"
        for label, f in figures["judged"].items()
    )
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")
    )
    form = "`W_i h + U_i emb(x)`" if figures["variant"] == "conditioned" else "`W_i h`"
    loss = (
        f"Last logged KL by depth: {last['kl']} (weighted {last['loss']}), top-1 agreement with "
        f"the target {last['agreement']}."
        if last
        else "These are the closed-form maps, without gradient steps."
    )
    card = f"""---
license: apache-2.0
base_model: {VERIFIER}
tags: [speculative-decoding, hidden-transfer]
---

# Hidden-transfer maps for SmolLM2-135M-Instruct, {figures["variant"]}

{form}, k = 4 steps, transfer layer 20 of 30 (hidden transfer, arXiv 2404.12022). They fit the
bf16 weights that `scripts/demo_target.py` makes; `config.json` holds their fingerprint.

| held-out answers | answers | acceptance length, 16 nodes | reached depth 1 / 2 / 3 / 4 | top-1 accuracy by depth |
|---|---|---|---|---|
{rows}

Judged offline on the target's own recorded answers (first 96 tokens) to held-out *training*
prompts, which also gave the softmax temperatures in `config.json`; figures on prompts of other
origin come from the engine (see the repository's README).

- Data: {figures["training_answers"]} answers of the target itself
  ({figures["training_answer_tokens"]} tokens; half greedy, half at temperature 0.8) to the prompts
  of `scripts/demo_prompts.py`; sha256 of its token ids {figures["data_sha256"]}.
- Method: closed-form ridge start, then AdamW on the KL to the target's own distribution with
  weights 0.8^i. {loss}
- Settings of the last round (`train_command.txt` and `training_log.jsonl` have all rounds):
  `{json.dumps(figures["settings"])}`
- Python {platform.python_version()},
  {versions}, CPU, fp32, stored as bf16.
- Limits: trained for this target's weights alone, English and Python mostly, short answers.
"""
    write_atomically(folder / "README.md", card.encode())


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
