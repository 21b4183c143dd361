# SPDX-License-Identifier: Apache-2.0
"""One training run from files to a checkpoint: what `vllm-hidden-transfer train` does."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_hidden_transfer.checkpoint.config import one_sentence
from vllm_hidden_transfer.checkpoint.fingerprint import FingerprintError, fingerprint_target
from vllm_hidden_transfer.checkpoint.maps import CheckpointError, TransferMaps
from vllm_hidden_transfer.offline.cache import Example, PrefixCache
from vllm_hidden_transfer.offline.data import read_corpus
from vllm_hidden_transfer.offline.prefixes import Prefixes, PrefixPasses
from vllm_hidden_transfer.offline.rows import DataError
from vllm_hidden_transfer.offline.target import FrozenTarget, text_config
from vllm_hidden_transfer.training.bigram import BigramInTraining, bigram_config, bigram_folder
from vllm_hidden_transfer.training.card import RunFacts, acceptance_of, corpus_digest, export
from vllm_hidden_transfer.training.layer_choice import (
    Candidate,
    candidate_layers,
    choose_layer,
    draft_share,
)
from vllm_hidden_transfer.training.mixture import mix
from vllm_hidden_transfer.training.parallel import Processes, joined_processes
from vllm_hidden_transfer.training.ridge import ridge_maps, ridge_passes
from vllm_hidden_transfer.training.settings import TrainSettings
from vllm_hidden_transfer.training.trainer import DraftTrainer, Trainer
from vllm_hidden_transfer.training.work_lock import sole_run

_TRIAL_STEPS = 60
_TRIAL_EXAMPLES = 160
_TRIAL_JUDGED = 12


@dataclass(frozen=True)
class Corpus:
    """What a run learns from, and what it is judged on."""

    train: list[Example]
    held_out: list[Example]

    @property
    def taught_tokens(self) -> int:
        """Answer tokens to learn from."""
        return sum(len(example.answer) for example in self.train)


class RunError(Exception):
    """Training cannot start or go on; the message is one sentence."""


def train(settings: TrainSettings, command: str, console: Console) -> None:
    """Train and write the checkpoint.

    Raises:
        InterruptedTraining: stopped by a signal; the state is saved.
        RunError: bad input, or a file that cannot be written.
    """
    try:
        _train(settings, command, console)
    except (DataError, FingerprintError, CheckpointError, ValueError) as error:
        raise RunError(one_sentence(str(error))) from error
    except OSError as error:
        where = error.filename or f"{settings.work_folder} or {settings.output}"
        raise RunError(
            one_sentence(
                f"{where}: {error.strerror or error}; what was saved before is kept, and the same command goes on"
            )
        ) from error


def _train(settings: TrainSettings, command: str, console: Console) -> None:
    with (
        joined_processes(settings.device) as processes,
        sole_run(settings.work_folder, processes),
    ):
        console.quiet = not processes.first
        started = time.monotonic()
        corpus = read_data(settings, console)
        folder = target_folder(settings.target)
        fingerprint = fingerprint_target(folder)
        first = 0 if settings.transfer_layer == "auto" else settings.transfer_layer
        target = FrozenTarget.load(folder, first, getattr(torch, settings.dtype), settings.device)
        if settings.transfer_layer == "auto":
            layer = auto_layer(settings, target, corpus, fingerprint, processes, console)
            target = target.at_layer(layer)
        prefixes = prefixes_of(settings, target, corpus, fingerprint, processes, console)
        trainer = make_trainer(settings, target, prefixes, corpus, fingerprint, processes, console)
        trainer.run()
        if settings.trains_bigrams:
            train_bigram(settings, trainer, corpus, processes, console)
        if processes.first:
            facts = RunFacts(
                command=command,
                fingerprint=fingerprint,
                folder=folder,
                answers=len(corpus.train),
                taught_tokens=corpus.taught_tokens,
                minutes=(time.monotonic() - started) / 60,
                corpus_digest=corpus_digest(corpus.train),
            )
            export(settings, trainer, corpus.held_out, facts, console)
        processes.wait()


def target_folder(target: str) -> Path:
    """The folder of a target given as a folder or as a hub id, which is downloaded where it is missing."""
    if Path(target).is_dir():
        return Path(target)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(target))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"the target {target} is neither a folder nor a hub id that can be fetched: give the folder of "
            "a Hugging Face model with --target"
        ) from error


def read_data(settings: TrainSettings, console: Console) -> Corpus:
    """Read, mix, cut and split the data."""
    from transformers import AutoTokenizer

    folder = target_folder(settings.target)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        vocab_size = text_config(folder).vocab_size
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the target {settings.target} has no usable tokenizer ({error})"
        ) from error
    read = read_corpus(
        settings.data, tokenizer, max_tokens=settings.max_tokens, vocab_size=vocab_size
    )
    for reason, count in read.left_out.items():
        console.print(f"{count} examples left out: {reason}")
    examples = read.examples[: settings.max_examples]
    if settings.own_share is not None:
        own = [example for example in examples if example.temperature is not None]
        other = [example for example in examples if example.temperature is None]
        examples = mix(own, other, settings.own_share, settings.seed)
    corpus = Corpus(
        train=[example for example in examples if not example.held_out],
        held_out=balanced([e for e in examples if e.held_out], settings.judged),
    )
    if not corpus.train or not corpus.held_out:
        raise ValueError(
            f"{len(examples)} examples are too few to train and to judge on: give more --data"
        )
    console.print(
        f"{len(corpus.train)} examples, {corpus.taught_tokens} tokens to learn; "
        f"{len(corpus.held_out)} held out"
    )
    return corpus


def balanced(examples: list[Example], count: int) -> list[Example]:
    """`count` examples, in equal parts greedy, sampled and text where there are enough."""
    groups: dict[bool | None, list[Example]] = {}
    for example in examples:
        key = None if example.temperature is None else example.temperature == 0.0
        groups.setdefault(key, []).append(example)
    chosen: list[Example] = []
    # The smallest group first: what it lacks is shared by the others.
    for left, group in zip(
        range(len(groups), 0, -1), sorted(groups.values(), key=len), strict=True
    ):
        chosen += group[: (count - len(chosen)) // left]
    return chosen


def prefixes_of(
    settings: TrainSettings,
    target: FrozenTarget,
    corpus: Corpus,
    fingerprint: str,
    processes: Processes,
    console: Console,
) -> Prefixes:
    """The prefixes of the corpus: on disk and complete, or computed when they are wanted."""
    if not settings.disk_cache:
        return PrefixPasses(target, 2 * settings.sequences)
    folder = settings.work_folder / f"cache-{target.transfer_layer}"
    examples = corpus.train + corpus.held_out
    if processes.first:
        cache = PrefixCache(folder, target, fingerprint)
        missing = [example for example in examples if example.digest not in cache.digests]
        _go_through(cache.fill(target, missing), "prefix cache", len(missing), console)
    processes.wait()
    return PrefixCache(folder, target, fingerprint)


def make_trainer(
    settings: TrainSettings,
    target: FrozenTarget,
    prefixes: Prefixes,
    corpus: Corpus,
    fingerprint: str,
    processes: Processes,
    console: Console,
) -> Trainer:
    """The trainer with its ridge start, or where it was stopped."""
    name = f"{settings.conditioning}-{target.transfer_layer}-{settings.transfer_steps}"
    state = settings.work_folder / name
    start = starting_maps(settings, target, prefixes, corpus.train, state, processes, console)
    frozen = f"{fingerprint} in {settings.dtype}"
    trainer = Trainer(
        target, prefixes, corpus.train, start, settings.training(), state, processes, frozen
    )
    if trainer.step:
        console.print(f"going on at step {trainer.step} of {settings.steps}")
    return trainer


def train_bigram(
    settings: TrainSettings,
    trainer: Trainer,
    corpus: Corpus,
    processes: Processes,
    console: Console,
) -> None:
    """Train the bigram re-weighting of maps that are finished, and put it into them."""
    console.print("the maps are trained; now the bigram re-weighting of their drafts")
    model = BigramInTraining(
        trainer.target, trainer.cache, trainer.maps, settings.bigram_rank, settings.seed
    )
    config = bigram_config(settings.training(), settings.bigram_steps)
    folder = bigram_folder(trainer.folder)
    DraftTrainer(model, corpus.train, config, folder, processes, trainer.frozen).run()
    trainer.maps.bigram = model.bigram


def starting_maps(
    settings: TrainSettings,
    target: FrozenTarget,
    prefixes: Prefixes,
    examples: list[Example],
    state: Path,
    processes: Processes,
    console: Console,
) -> TransferMaps:
    """The closed-form start; empty maps where a saved state or those of the first process will replace them."""
    steps, conditioning = settings.transfer_steps, settings.conditioning
    if not processes.first or Trainer.is_saved(state):
        return TransferMaps(steps, target.hidden_size, conditioning)
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        total = len(examples) * ridge_passes(steps, conditioning)
        task = progress.add_task("ridge start", total=total)
        return ridge_maps(
            prefixes,
            target,
            examples,
            steps,
            conditioning,
            on_example=lambda: progress.advance(task),
        )


def auto_layer(
    settings: TrainSettings,
    target: FrozenTarget,
    corpus: Corpus,
    fingerprint: str,
    processes: Processes,
    console: Console,
) -> int:
    """Try some layers with short runs on a part of the corpus, show the table, and return the best."""
    part = Corpus(corpus.train[:_TRIAL_EXAMPLES], corpus.held_out[:_TRIAL_JUDGED])

    def try_layer(layer: int) -> Candidate:
        console.print(f"trying transfer layer {layer}")
        trial = settings.model_copy(
            update={"work": settings.work_folder / "layers", "steps": _TRIAL_STEPS}
        )
        there = target.at_layer(layer)
        prefixes = prefixes_of(trial, there, part, fingerprint, processes, console)
        trainer = make_trainer(trial, there, prefixes, part, fingerprint, processes, console)
        trainer.run()
        length = acceptance_of(there, prefixes, trainer.maps, part.held_out)
        parameters = sum(parameter.numel() for parameter in trainer.maps.parameters())
        return Candidate(layer, length, draft_share(there, parameters))

    found = choose_layer(candidate_layers(target.num_layers), try_layer)
    table = Table(title=f"transfer layers of {target.num_layers}, {_TRIAL_STEPS} steps each")
    for column in (
        "layer",
        "acceptance length",
        "draft pass / target pass",
        "tokens per unit of cost",
    ):
        table.add_column(column)
    for candidate in sorted(found, key=lambda each: each.layer):
        table.add_row(
            f"{candidate.layer}" + (" (chosen)" if candidate is found[0] else ""),
            f"{candidate.acceptance_length:.2f}",
            f"{candidate.draft_share:.2f}",
            f"{candidate.worth:.2f}",
        )
    console.print(table)
    # Judged by every process, and a hair's breadth between two layers must not part them.
    return processes.number_of_first(found[0].layer)


def _go_through(work: Iterable[Any], what: str, total: int, console: Console) -> None:
    for _ in track(work, what, total=total, console=console, transient=True):
        pass
