# SPDX-License-Identifier: Apache-2.0
"""The engine's draft pass against an independent one in Hugging Face transformers, in fp32."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.doubles.planted import PlantedSource
from tests.support.checkpoints import random_checkpoint
from tests.support.engines import (
    acceptance_length,
    counters_of,
    engine,
    generate,
    planted_options,
    random_prompts,
)
from vllm_hidden_transfer.checkpoint.maps import load_checkpoint
from vllm_hidden_transfer.drafting import lookup
from vllm_hidden_transfer.drafting.bigram import BigramTables
from vllm_hidden_transfer.drafting.distributions import candidates
from vllm_hidden_transfer.drafting.source import DraftBatch
from vllm_hidden_transfer.engine.v1.transfer_source import TransferSource
from vllm_hidden_transfer.tree import TokenTree, TreeTensors, most_probable

if TYPE_CHECKING:
    from vllm_hidden_transfer.engine.cpu import TreeCPUModelRunner

pytestmark = pytest.mark.engine

CHECKPOINT_VARIABLE = "VLLM_HIDDEN_TRANSFER_TEST_CHECKPOINT"


class DraftsAndPlants(TransferSource):
    """Runs the draft pass, and plants trees that are accepted: the hidden states are those of accepted nodes."""

    def __init__(self, runner: TreeCPUModelRunner) -> None:
        super().__init__(runner, os.environ[CHECKPOINT_VARIABLE])
        self._planted = PlantedSource(runner)

    def propose(self, batch: DraftBatch) -> list[TokenTree]:
        super().propose(batch)
        return self._planted.propose(batch)


def reference_draft_logits(model: Any, checkpoint: Path, tokens: np.ndarray) -> torch.Tensor:
    """Draft logits [k, vocabulary] after ``tokens``, whose last one has not been processed yet."""
    config, maps = load_checkpoint(checkpoint)
    layer = config.transfer_layer
    ids = torch.tensor(tokens[None].astype(np.int64))
    decoder = model.model
    states = model(ids[:, :-1], output_hidden_states=True).hidden_states[layer]
    pseudo = maps.float()(states[:, -1], decoder.embed_tokens(ids[:, -1]))
    rows = torch.cat([states, pseudo], dim=1)
    positions = torch.arange(rows.shape[1])[None]
    mask = torch.full((rows.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    rope = decoder.rotary_emb(rows, positions)
    for block in decoder.layers[layer:]:
        rows = block(rows, attention_mask=mask, position_ids=positions, position_embeddings=rope)
        rows = rows[0] if isinstance(rows, tuple) else rows
    return model.lm_head(decoder.norm(rows[:, -config.num_transfer_steps :]))[0]


def worth_of_paths(trees: TreeTensors) -> dict[tuple[int, ...], float]:
    """The probability of every path of one tree."""
    (tree,) = trees.on_host()
    assert tree.log_probabilities is not None
    return {
        tuple(tree.tokens[tree.path(node)].tolist()): float(np.exp(score))
        for node, score in enumerate(tree.log_probabilities)
    }


def assert_best_trees(
    model: Any, checkpoint: Path, drafted: list[tuple[np.ndarray, TokenTree]], budget: int
) -> int:
    """No tree of so many nodes is more probable under transformers' own drafts and the copies.

    Returns:
        How many nodes are copies.
    """
    config, maps = load_checkpoint(checkpoint)
    bigram = None
    if maps.bigram is not None:
        head = torch.nn.Embedding.from_pretrained(model.lm_head.weight)
        bigram = BigramTables.of(
            maps.bigram, config.target.vocab_size, model.model.embed_tokens, head
        )
    temperatures = torch.tensor(config.calibration.temperatures)
    copied_nodes = 0
    for known, tree in drafted:
        logits = reference_draft_logits(model, checkpoint, known)[None]
        found = candidates(logits, temperatures, budget, bigram)
        copied = lookup.mixed_in(lookup.look_up([known]), lookup.SHARES)
        # Eight times the nodes, so that all that may have changed places with the last one is in it.
        worth = worth_of_paths(most_probable(found, 8 * budget, copied))
        paths = [tuple(tree.tokens[tree.path(node)].tolist()) for node in range(len(tree))]
        best = sum(sorted(worth.values(), reverse=True)[:budget])
        assert sum(worth[path] for path in paths) == pytest.approx(best, rel=1e-2)
        if copied is not None:
            copy = copied.tokens[0].tolist()
            copied_nodes += sum(list(path) == copy[: len(path)] for path in paths)
    return copied_nodes


@pytest.mark.parametrize(("conditioning", "bigram_rank"), [("token", 8), ("none", 0)])
@torch.inference_mode()
def test_drafts_equal_transformers(
    conditioning: Any,
    bigram_rank: int,
    random_target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = random_checkpoint(
        tmp_path / "maps", random_target, conditioning=conditioning, bigram_rank=bigram_rank
    )
    seen: list[tuple[np.ndarray, torch.Tensor]] = []
    drafted: list[tuple[np.ndarray, TokenTree]] = []
    stock, propose = TransferSource.draft_logits, TransferSource.propose

    def recording_trees(self: TransferSource, batch: Any) -> list[TokenTree]:
        trees = propose(self, batch)
        drafted.extend(zip((tokens.copy() for tokens in batch.token_ids), trees, strict=True))
        return trees

    def recording(self: TransferSource, batch: Any, columns: None) -> torch.Tensor:
        logits = stock(self, batch, columns)
        seen.extend(
            (tokens.copy(), row.clone())
            for tokens, row in zip(batch.token_ids, logits, strict=True)
        )
        return logits

    monkeypatch.setattr(TransferSource, "draft_logits", recording)
    monkeypatch.setattr(TransferSource, "propose", recording_trees)
    # As fitted, a match of one token is not trusted at depth 1, and longer ones are rare beside random maps.
    monkeypatch.setattr(lookup, "SHARES", np.full_like(lookup.SHARES, 0.5))
    monkeypatch.setenv(CHECKPOINT_VARIABLE, str(checkpoint))
    # Long ones hold many tokens, so that the answers of a random target give prompt lookup something to copy.
    prompts = random_prompts(5, lengths=(400, 350, 300, 40, 5))
    chunked = {"max_num_batched_tokens": 64}
    with engine(random_target, **chunked) as llm:
        reference = generate(llm, prompts, max_tokens=24)
    reference.plant(tmp_path / "answers.json")
    options = {"method": "hidden_transfer", "model": str(checkpoint), "always_draft": True}
    with engine(random_target, speculative_config=options, **chunked) as llm:
        generate(llm, prompts, max_tokens=24)
        counters = counters_of(llm)
    assert counters.drafts > 0
    assert counters.draft_tokens > counters.drafts
    source = f"{DraftsAndPlants.__module__}:{DraftsAndPlants.__name__}"
    with engine(random_target, **chunked, **planted_options(8, source)) as llm:
        texts = generate(llm, prompts, max_tokens=24)
        assert acceptance_length(texts, counters_of(llm)) >= 2

    model = AutoModelForCausalLM.from_pretrained(
        random_target, dtype=torch.float32, attn_implementation="eager"
    )
    worst = max(
        float((reference_draft_logits(model, checkpoint, tokens) - logits).abs().max())
        for tokens, logits in seen
    )
    assert len(seen) > 140
    assert worst < 1e-3
    assert assert_best_trees(model, checkpoint, drafted[::2], 8) > 3
