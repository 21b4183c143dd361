# SPDX-License-Identifier: Apache-2.0
"""vLLM's FLASH_ATTN with trees."""

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from vllm_hidden_transfer.engine.attention.tree_backend import tree_backend

TreeFlashAttentionBackend = tree_backend(FlashAttentionBackend)
