# SPDX-License-Identifier: Apache-2.0
"""Everything that `eval` and `tune` need before they judge: target, checkpoint, answers and their prefixes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from vllm_hidden_transfer.checkpoint.config import TransferConfig, one_sentence
from vllm_hidden_transfer.checkpoint.fingerprint import FingerprintError, fingerprint_target
from vllm_hidden_transfer.checkpoint.maps import CheckpointError, TransferMaps, load_checkpoint
from vllm_hidden_transfer.drafting.vocabulary import DraftVocabulary
from vllm_hidden_transfer.evaluation.drafts import JudgedAnswer
from vllm_hidden_transfer.evaluation.study import group_name, judged_answers
from vllm_hidden_transfer.offline.cache import Example, PrefixCache
from vllm_hidden_transfer.offline.data import Corpus, read_corpus
from vllm_hidden_transfer.offline.rows import DataError
from vllm_hidden_transfer.offline.target import FrozenTarget, text_config
from vllm_hidden_transfer.options import Device, TargetDtype

_LONGEST = 2048
_UNKNOWN_SPLIT = (
    "The checkpoint {} does not say what was held out of its training (earlier versions chose by names of files): "
    "judge it on other data, without --held-out, or train it again."
)
_SHORTEST = 2

Item = TypeVar("Item")


class JudgingError(Exception):
    """A checkpoint cannot be judged; the message is one sentence."""

    def __init__(self, message: object) -> None:
        super().__init__(one_sentence(str(message)))


@dataclass(frozen=True)
class Request:
    """What the user named."""

    target: Path
    checkpoint: Path
    data: Sequence[Path]
    cache: Path
    max_tokens: int
    limit: int
    """Answers of each group (greedy, each temperature, other text) at most."""
    held_out: bool
    """Judge only what `train` keeps out of its training data."""
    allow_target_mismatch: bool
    dtype: TargetDtype = "float32"
    """Of the target while it is judged."""
    device: Device = "cpu"
    """Where it is judged; cuda was never run by us."""


@dataclass(frozen=True)
class Prepared:
    """What there is to judge, all prefixes computed."""

    config: TransferConfig
    maps: TransferMaps
    """As they are stored, but in fp32."""
    vocabulary: DraftVocabulary | None
    """What the checkpoint drafts from; None for all tokens."""
    target: FrozenTarget
    fingerprint: str
    """The target's own, which is not the checkpoint's where a mismatch is allowed."""
    prefixes: PrefixCache
    answers: list[JudgedAnswer]

    @property
    def trained_for_this_target(self) -> bool:
        """Whether the maps were trained for these weights."""
        return self.fingerprint == self.config.target.fingerprint


def missing_packages(*packages: str) -> str | None:
    """One sentence about optional packages that are not installed; None where all are."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return (
        f"Judging needs {' and '.join(missing)}: install the extra "
        "with `pip install 'vllm-hidden-transfer[train]'`."
    )


def progress_bar(console: Console) -> Progress:
    """The bar of all steps of a study."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def prepare(request: Request, console: Console, progress: Progress) -> Prepared:
    """Check and load everything, and run the target over answers that the cache lacks.

    Raises:
        JudgingError: something is missing, damaged, or does not fit.
    """
    try:
        config, maps = load_checkpoint(request.checkpoint)
        vocabulary = DraftVocabulary.of(request.checkpoint, config)
        if request.held_out and config.held_out_by is None:
            raise JudgingError(_UNKNOWN_SPLIT.format(request.checkpoint))
        fingerprint = _check_target(request, config, console)
        examples = _read_examples(request, config.target.vocab_size, console)
        dtype = getattr(torch, request.dtype)
        target = FrozenTarget.load(request.target, config.transfer_layer, dtype, request.device)
        prefixes = PrefixCache(request.cache, target, fingerprint)
        missing = [example for example in examples if example.digest not in prefixes.digests]
        work = prefixes.fill(target, missing)
        for _ in progress.track(work, total=len(missing), description="reading answers"):
            pass
    except (CheckpointError, FingerprintError, DataError, OSError, ValueError) as error:
        raise JudgingError(error) from error
    answers = judged_answers(examples, request.max_tokens)
    return Prepared(config, maps.float(), vocabulary, target, fingerprint, prefixes, answers)


def _check_target(request: Request, config: TransferConfig, console: Console) -> str:
    """The target's fingerprint, when the checkpoint fits it."""
    found = target_config(request.target)
    shape = config.target.model_dump(exclude={"fingerprint"})
    for name, expected in shape.items():
        if getattr(found, name, None) != expected:
            raise JudgingError(
                f"The checkpoint {request.checkpoint} is for a target with {name} {expected}, but "
                f"{request.target} has {getattr(found, name, None)}: train maps for this target."
            )
    fingerprint = fingerprint_target(request.target)
    if fingerprint != config.target.fingerprint:
        mismatch = (
            f"The checkpoint {request.checkpoint} was trained for other weights than those of "
            f"{request.target}: train maps for this target"
        )
        if not request.allow_target_mismatch:
            raise JudgingError(f"{mismatch}, or judge all the same with --allow-target-mismatch.")
        console.print(f"{mismatch}; judged all the same.")
    return fingerprint


def target_config(target: Path) -> Any:
    """The transformers configuration of the target's decoder.

    Raises:
        JudgingError: there is no target.
        OSError, ValueError: its config.json is none that transformers can read.
    """
    if not (target / "config.json").is_file():
        raise JudgingError(f"There is no target model in {target}: it has no config.json.")
    return text_config(target)


def read_answers(target: Path, paths: Sequence[Path], vocab_size: int) -> Corpus:
    """Answers and texts to judge on, as the target's tokenizer splits them.

    Raises:
        DataError: a file cannot be used.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    return read_corpus(
        paths, tokenizer, max_tokens=_LONGEST, min_tokens=_SHORTEST, vocab_size=vocab_size
    )


def _read_examples(request: Request, vocab_size: int, console: Console) -> list[Example]:
    corpus = read_answers(request.target, request.data, vocab_size)
    for reason, count in corpus.left_out.items():
        console.print(f"{count} left out: {reason}")
    examples = [e for e in corpus.examples if not request.held_out or e.held_out]
    chosen = spread_by_group(examples, request.limit)
    if not judged_answers(chosen, request.max_tokens):
        raise JudgingError(
            "There is no answer to judge in the data"
            + (" that `train` would keep out of training" if request.held_out else "")
            + ": give more --data."
        )
    return [_shortened(example, request.max_tokens) for example in chosen]


def spread_by_group(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most `limit` examples of each group, evenly spread over the data, in its order."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(group_name(example.temperature), []).append(example)
    return [example for group in groups.values() for example in spread(group, limit)]


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` items, evenly spread, in their order."""
    count = min(limit, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _shortened(example: Example, max_tokens: int) -> Example:
    """Text without what is not judged; the target's own answers stay whole, as `train` has them in its cache."""
    if example.temperature is not None:
        return example
    answer = JudgedAnswer.of(example, max_tokens)
    tokens = example.tokens
    end = answer.first + len(answer.tokens)
    return replace(example, prompt=tokens[: answer.first], answer=tokens[answer.first : end])
