# SPDX-License-Identifier: Apache-2.0
"""The second target of `mismatch.py`: all weights trained on a text for some minutes."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vllm_hidden_transfer.training.data import read_corpus

WINDOW, WINDOWS = 256, 4
"""Tokens of a window, and windows of a step."""
LEARNING_RATE, WARM_UP = 1e-4, 5
SEED = 20261121


def windows(path: Path, tokenizer: Any) -> list[list[int]]:
    """Documents one after another, in pieces of `WINDOW` tokens."""
    corpus = read_corpus([path], tokenizer, max_tokens=WINDOW)
    return [example.tokens for example in corpus.examples]


def descend(
    model: Any, examples: Sequence[Sequence[int]], seconds: float, console: Console
) -> list[float]:
    """Plain AdamW on all weights until the time is over; the loss of each step, at least of one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(SEED)
    model.train()
    losses: list[float] = []
    queue: list[int] = []
    started = time.monotonic()
    while not losses or time.monotonic() - started < seconds:
        while len(queue) < WINDOWS:
            queue += torch.randperm(len(examples), generator=generator).tolist()
        chosen, queue = queue[:WINDOWS], queue[WINDOWS:]
        tokens = torch.tensor([examples[number] for number in chosen])
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (len(losses) + 1) / WARM_UP)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if len(losses) % 10 == 0:
            console.print(f"step {len(losses)}: loss {sum(losses[-10:]) / 10:.3f}")
    model.eval()
    return losses


@torch.no_grad()
def perplexity(model: Any, examples: Sequence[Sequence[int]]) -> float:
    """exp of the mean -log p of all tokens but the first of each window."""
    total, count = 0.0, 0
    for tokens in examples:
        ids = torch.tensor([tokens])
        total += float(model(input_ids=ids, labels=ids).loss) * (len(tokens) - 1)
        count += len(tokens) - 1
    return math.exp(total / count)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete; what a killed run left goes away."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    for old in (unfinished, folder):
        if old.exists():
            shutil.rmtree(old)
    unfinished.mkdir(parents=True)
    yield unfinished
    unfinished.rename(folder)
