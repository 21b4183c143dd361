# SPDX-License-Identifier: Apache-2.0
"""Small random targets. A default-initialised one repeats a single token and proves nothing: these are untied and
initialised with a standard deviation of 0.12, so that their greedy texts wander."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 2048
STANDARD_DEVIATION = 0.12
_TEXT_MODULES = ("argparse", "ast", "calendar", "difflib", "inspect", "json", "random", "typing")

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {"head_dim": 32}),
    "Phi3": ("Phi3Config", {}),
    "Qwen3Moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
    ),
    "Gemma2": ("Gemma2Config", {"head_dim": 32, "query_pre_attn_scalar": 32}),
    "Gemma3": ("Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 32}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Granite": ("GraniteConfig", {}),
    "Olmo2": ("Olmo2Config", {}),
}
"""transformers' configuration class of each family, and what it needs beside the common shape."""


def random_model(
    folder: Path, family: str = "Llama", layers: int = 8, vocabulary: int = VOCABULARY, **more: Any
) -> Path:
    """Save a random model (d = 256, grouped-query attention) of a family to ``folder``, made once."""
    if (folder / "config.json").is_file():
        return folder
    name, own = FAMILIES[family]
    config = getattr(importlib.import_module("transformers"), name)(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "initializer_range": STANDARD_DEVIATION,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            **own,
            **more,
        }
    )
    torch.manual_seed(20261121)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def tiny_llama(vocabulary: int) -> LlamaForCausalLM:
    """A random Llama of 4 layers and d = 32 in fp32, the same at every call: for training and judging without vLLM."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=STANDARD_DEVIATION,
    )
    return LlamaForCausalLM(config)


def add_tokenizer(folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """Give a target a byte-level BPE tokenizer of its own vocabulary, trained on some of Python's own sources."""
    from tokenizers import ByteLevelBPETokenizer

    sources = [inspect.getsource(importlib.import_module(name)) for name in _TEXT_MODULES]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        sources, vocabulary, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False
    )
    assert tokenizer.get_vocab_size() == vocabulary
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(folder)
    return folder


def random_adapter(folder: Path, target: Path, seed: int = 3, rank: int = 8) -> Path:
    """Save a random LoRA adapter (PEFT's format) for the attention projections of a random Llama."""
    if (folder / "adapter_config.json").is_file():
        return folder
    folder.mkdir(parents=True)
    shape = json.loads((target / "config.json").read_text())
    size = shape["hidden_size"]
    widths = {
        "q_proj": size,
        "v_proj": size // shape["num_attention_heads"] * shape["num_key_value_heads"],
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for module, width in widths.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, size, generator=generator) * 0.2
            tensors[f"{name}.lora_B.weight"] = torch.randn(width, rank, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(target),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(widths),
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder
