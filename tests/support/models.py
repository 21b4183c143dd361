# SPDX-License-Identifier: Apache-2.0
"""Small random targets. A default-initialised one repeats a single token and proves nothing: these are untied and
initialised with a standard deviation of 0.12, so that their greedy texts wander."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 2048


def random_llama(folder: Path, layers: int = 8, vocabulary: int = VOCABULARY) -> Path:
    """Save a random Llama with grouped-query attention (d = 256) to ``folder``, made once."""
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(20261121)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder
