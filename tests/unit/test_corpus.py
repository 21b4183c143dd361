# SPDX-License-Identifier: Apache-2.0
"""What a run learns from and what it is judged on, read from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig

from tests.support.models import add_tokenizer
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.training.layer_choice import Candidate, choose_layer
from vllm_hidden_transfer.training.run import Corpus, read_data
from vllm_hidden_transfer.training.settings import TrainSettings

VOCABULARY = 400


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target's folder without its weights: nothing here runs it."""
    folder = add_tokenizer(tmp_path_factory.mktemp("target"), VOCABULARY)
    LlamaConfig(vocab_size=VOCABULARY).save_pretrained(folder)
    return folder


def examples() -> list[Example]:
    """Answers of the target's own, three greedy and three sampled ones to a prompt, and three of somebody else's to
    another."""
    return [
        Example(
            f"{temperature}-{number}-{again}",
            "chat",
            temperature,
            [3 + number // 20, 30 + number % 20, 60 if temperature is None else 70],
            [100 + again] * 20,
        )
        for number in range(200)
        for again in range(3)
        for temperature in (0.0, 0.8, None)
    ]


def corpus_of(target: Path, tmp_path: Path, **more: Any) -> Corpus:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(example.record) + "\n" for example in examples()))
    settings = TrainSettings(
        target=str(target), data=[path], output=tmp_path / "maps", judged=500, **more
    )
    return read_data(settings, Console(quiet=True))


def test_nothing_that_is_judged_is_taught(target: Path, tmp_path: Path) -> None:
    corpus = corpus_of(target, tmp_path)
    taught = {tuple(example.prompt) for example in corpus.train}
    judged = {tuple(example.prompt) for example in corpus.held_out}
    assert not taught & judged
    assert len(taught) > 10 * len(judged) > 0
    assert {example.temperature for example in corpus.held_out} == {0.0, 0.8, None}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_the_share_of_own_answers_is_kept(share: float, target: Path, tmp_path: Path) -> None:
    corpus = corpus_of(target, tmp_path, own_share=share)
    for part, off in ((corpus.train, 0.02), (corpus.train + corpus.held_out, 0.02)):
        tokens = [len(e.answer) * (e.temperature is not None) for e in part]
        found = sum(tokens) / sum(len(example.answer) for example in part)
        assert found == pytest.approx(share, abs=off)


def test_the_layer_with_most_tokens_per_unit_of_cost_comes_first() -> None:
    tried = {
        3: Candidate(3, 2.6, 0.9),
        4: Candidate(4, 2.5, 0.5),
        5: Candidate(5, 1.4, 0.3),
    }
    found = choose_layer([3, 4, 5], tried.__getitem__)
    assert [candidate.layer for candidate in found] == [4, 3, 5]
    assert found[0].worth == pytest.approx(2.5 / 1.5)
