# SPDX-License-Identifier: Apache-2.0
"""vLLM's TRITON_ATTN with trees: fp32, AMD, batch invariance, and the CPU test bed."""

from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from vllm_hidden_transfer.engine.attention.tree_backend import tree_backend

TreeTritonAttentionBackend = tree_backend(TritonAttentionBackend)
