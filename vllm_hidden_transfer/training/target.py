# SPDX-License-Identifier: Apache-2.0
"""The frozen target: its prefix pass, run once, and its upper layers over pseudo rows.

The upper layers are written out here because pseudo rows attend in a way that no library call
offers: to the shared prefix up to their root, and to the earlier rows of their own root. So far
this knows Llama's maths (RMSNorm, rotary embedding, grouped-query attention, gated MLP).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FAMILIES = ("llama",)


@dataclass(frozen=True)
class Prefix:
    """What one sequence of n tokens leaves behind; u = L - t upper layers."""

    hidden: Tensor
    """[n, d]: the residual stream entering layer t."""
    keys: Tensor
    """[u, n, kv_heads, head_dim]: rotated keys of layers t..L-1."""
    values: Tensor
    """[u, n, kv_heads, head_dim]."""
    final: Tensor
    """[n, d]: after the last norm; the LM head reads it."""


@dataclass(frozen=True)
class SharedPrefixes:
    """Prefixes of b sequences, padded to n tokens, for one step's rows."""

    keys: Tensor
    """[b, u, n, kv_heads, head_dim]."""
    values: Tensor
    """[b, u, n, kv_heads, head_dim]."""


class FrozenTarget:
    """A Hugging Face Llama in fp32 (or `dtype`), without gradients for its weights."""

    def __init__(self, model: Any, transfer_layer: int) -> None:
        if model.config.model_type not in FAMILIES:
            raise ValueError(
                f"training knows the families {', '.join(FAMILIES)}, "
                f"the target is a {model.config.model_type}"
            )
        if not 0 <= transfer_layer < model.config.num_hidden_layers:
            raise ValueError(
                f"transfer layer {transfer_layer} does not exist: the target has "
                f"{model.config.num_hidden_layers} layers"
            )
        self.model = model.eval().requires_grad_(False)
        self.transfer_layer = transfer_layer
        config = model.config
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.vocab_size: int = config.vocab_size
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or self.hidden_size // self.num_heads
        self.architectures: list[str] = list(config.architectures or [type(model).__name__])

    @classmethod
    def load(
        cls, folder: str | Path, transfer_layer: int, dtype: torch.dtype = torch.float32
    ) -> FrozenTarget:
        """Load the target from a Hugging Face folder."""
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), transfer_layer)

    @property
    def num_upper_layers(self) -> int:
        """Number of layers t..L-1."""
        return self.num_layers - self.transfer_layer

    @property
    def head_weight(self) -> Tensor:
        """LM head weight [vocabulary, d]."""
        weight: Tensor = self.model.lm_head.weight
        return weight

    def embed(self, token_ids: Tensor) -> Tensor:
        """Raw input embedding rows [..., d] of token ids [...]."""
        embedded: Tensor = self.model.model.embed_tokens(token_ids)
        return embedded

    @torch.no_grad()
    def prefix(self, token_ids: Tensor) -> Prefix:
        """Run the whole target over one sequence of token ids [n]."""
        output = self.model.model(
            token_ids[None], use_cache=True, output_hidden_states=True, return_dict=True
        )
        layers = output.past_key_values.layers[self.transfer_layer :]
        return Prefix(
            hidden=output.hidden_states[self.transfer_layer][0],
            keys=torch.stack([layer.keys[0].transpose(0, 1) for layer in layers]),
            values=torch.stack([layer.values[0].transpose(0, 1) for layer in layers]),
            final=output.last_hidden_state[0],
        )

    def run_rows(self, pseudo: Tensor, roots: Tensor, prefixes: SharedPrefixes) -> Tensor:
        """Upper layers over pseudo rows; gradients flow to `pseudo`.

        Row (b, r, i) stands at position ``roots[b, r] + 1 + i``, sees the prefix of sequence b up
        to and including its root, and rows 0..i of its own root: one softmax over both, so the
        cost is linear in the number of rows.

        Args:
            pseudo: [b, roots, k, d], the residual stream entering layer t.
            roots: int64 [b, roots], position of each root.
            prefixes: the upper layers' keys and values of the b sequences.

        Returns:
            [b, roots, k, d] after the last norm.
        """
        batch, num_roots, steps, _ = pseudo.shape
        device = pseudo.device
        positions = roots[:, :, None] + 1 + torch.arange(steps, device=device)
        cos, sin = self.model.model.rotary_emb(pseudo, positions.view(batch, -1))
        cos, sin = (part.view(batch, num_roots, steps, 1, -1) for part in (cos, sin))
        length = prefixes.keys.shape[2]
        hidden_keys = torch.arange(length, device=device) > roots[:, :, None]
        prefix_bias = pseudo.new_zeros(batch, num_roots, length)
        prefix_bias.masked_fill_(hidden_keys, float("-inf"))
        own_bias = torch.full((steps, steps), float("-inf"), device=device, dtype=pseudo.dtype)
        own_bias.triu_(1)
        hidden = pseudo
        for upper, layer in enumerate(self.model.model.layers[self.transfer_layer :]):
            normed = layer.input_layernorm(hidden)
            attended = self._attend(
                layer.self_attn,
                normed,
                (cos, sin),
                (prefixes.keys[:, upper], prefixes.values[:, upper]),
                (prefix_bias, own_bias),
            )
            hidden = hidden + attended
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        normed_final: Tensor = self.model.model.norm(hidden)
        return normed_final

    def _attend(
        self,
        attention: Any,
        normed: Tensor,
        rotary: tuple[Tensor, Tensor],
        shared: tuple[Tensor, Tensor],
        biases: tuple[Tensor, Tensor],
    ) -> Tensor:
        batch, num_roots, steps, _ = normed.shape
        groups = self.num_heads // self.num_kv_heads
        heads = (batch, num_roots, steps, -1, self.head_dim)
        query = _rotate(attention.q_proj(normed).view(heads), *rotary) * attention.scaling
        key = _rotate(attention.k_proj(normed).view(heads), *rotary)
        value = attention.v_proj(normed).view(heads)
        # Queries of one KV head side by side: [b, kv, roots, k * groups, head_dim].
        query = query.view(batch, num_roots, steps, self.num_kv_heads, groups, self.head_dim)
        query = query.permute(0, 3, 1, 2, 4, 5).flatten(3, 4)
        key, value = (part.permute(0, 3, 1, 2, 4) for part in (key, value))
        shared_key, shared_value = (part.transpose(1, 2) for part in shared)
        prefix_bias, own_bias = biases
        flat = query.flatten(2, 3)
        scores = (flat @ shared_key.transpose(-1, -2)).view(*query.shape[:4], -1)
        scores = scores + prefix_bias[:, None, :, None, :]
        own = query @ key.transpose(-1, -2) + own_bias.repeat_interleave(groups, dim=0)
        weights = torch.cat([scores, own], dim=-1).softmax(dim=-1)
        length = scores.shape[-1]
        mixed = (weights[..., :length].flatten(2, 3) @ shared_value).view(query.shape)
        mixed = mixed + weights[..., length:] @ value
        mixed = mixed.unflatten(3, (steps, groups)).permute(0, 2, 3, 1, 4, 5)
        projected: Tensor = attention.o_proj(mixed.flatten(3))
        return projected


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in Llama's half-split layout; states [..., heads, head_dim]."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
