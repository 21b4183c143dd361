# SPDX-License-Identifier: Apache-2.0
"""The engine's draft pass against an independent one in Hugging Face transformers, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import random_checkpoint
from tests.support.engines import counters_of, engine, generate, random_prompts
from vllm_hidden_transfer.transfer import load_checkpoint

pytestmark = pytest.mark.engine


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


@pytest.mark.parametrize("conditioning", ["token", "none"])
@torch.inference_mode()
def test_draft_logits_equal_transformers(
    conditioning: Any, random_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_hidden_transfer.engine.transfer_source import TransferSource

    checkpoint = random_checkpoint(tmp_path / "maps", random_target, conditioning=conditioning)
    seen: list[tuple[np.ndarray, torch.Tensor]] = []
    stock = TransferSource.draft_logits

    def recording(self: TransferSource, batch: Any) -> torch.Tensor:
        logits = stock(self, batch)
        seen.extend(
            (tokens.copy(), row.clone())
            for tokens, row in zip(batch.token_ids, logits, strict=True)
        )
        return logits

    monkeypatch.setattr(TransferSource, "draft_logits", recording)
    options = {"method": "hidden_transfer", "model": str(checkpoint)}
    with engine(random_target, speculative_config=options, max_num_batched_tokens=64) as llm:
        generate(llm, random_prompts(5, longest=70), max_tokens=24)
        counters = counters_of(llm)
    assert counters.drafts > 0
    assert counters.draft_tokens > counters.drafts

    model = AutoModelForCausalLM.from_pretrained(
        random_target, dtype=torch.float32, attn_implementation="eager"
    )
    worst = max(
        float((reference_draft_logits(model, checkpoint, tokens) - logits).abs().max())
        for tokens, logits in seen
    )
    assert len(seen) > 100
    assert worst < 1e-3
