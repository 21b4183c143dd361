# SPDX-License-Identifier: Apache-2.0
"""The frozen target: its prefix pass, run once, and its upper layers over pseudo rows.

The target's own transformers layers do all of the maths. Only attention is ours, through transformers' attention
interface: pseudo rows attend to the shared prefix up to their root and to the earlier rows of their own root, which
no library call offers. Whether that fits a family is not looked up: every target is tried on a short text when it is
loaded, and true hidden states must give the frozen logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vllm_hidden_transfer.checkpoint.config import one_sentence

_ROWS = "hidden_transfer_rows"
_PREFIX = "hidden_transfer_prefix"
_PROBE_TOKENS = 12
_WITHIN = (
    "{} is a decoder inside another model (its config.json has a part of its own for text), which neither training "
    "nor the engine reaches into: take the text model alone, saved as a folder of its own"
)


class UnfitTargetError(ValueError):
    """The target cannot be trained for; the message is one sentence."""

    def __init__(self, message: str) -> None:
        super().__init__(one_sentence(message))


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


@dataclass
class _Caught:
    """Keys and values of one prefix pass, [heads, n, head_dim] by number of the layer."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rows:
    """What the rows of a draft pass attend to."""

    roots: Tensor
    steps: int
    prefixes: SharedPrefixes
    first_layer: int


def text_config(folder: str | Path) -> Any:
    """The transformers configuration of a target's decoder: config.json itself, or the part of it that is for text.

    Raises:
        OSError, ValueError: the folder has none that transformers can read.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).get_text_config()


class FrozenTarget:
    """A Hugging Face decoder without gradients for its weights."""

    def __init__(self, model: Any, transfer_layer: int) -> None:
        config = model.config.get_text_config()
        if config is not model.config:
            raise UnfitTargetError(_WITHIN.format(type(model).__name__))
        inner = getattr(model, "model", None)
        parts = ("layers", "norm", "rotary_emb", "embed_tokens")
        missing = [part for part in parts if not hasattr(inner, part)]
        if missing or not hasattr(model, "lm_head"):
            raise UnfitTargetError(
                f"{type(model).__name__} is not built like a Llama (it lacks {missing or 'lm_head'}): "
                "training needs model.layers, model.norm, model.rotary_emb, model.embed_tokens and lm_head"
            )
        if not 0 <= transfer_layer < config.num_hidden_layers:
            raise UnfitTargetError(
                f"transfer layer {transfer_layer} does not exist: the target has "
                f"{config.num_hidden_layers} layers, 0 to {config.num_hidden_layers - 1}"
            )
        self.model = model.eval().requires_grad_(False)
        self.transfer_layer = transfer_layer
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.vocab_size: int = config.vocab_size
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.head_dim: int = getattr(config, "head_dim", None) or self.hidden_size // self.num_heads
        self.architectures: list[str] = list(config.architectures or [type(model).__name__])
        self._probe()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        transfer_layer: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> FrozenTarget:
        """Load the target from a Hugging Face folder or from the hub.

        Raises:
            UnfitTargetError: the target cannot be loaded, or drafting rows do not fit its layers.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

        if device == "cuda" and not torch.cuda.is_available():
            raise UnfitTargetError("--device cuda: torch finds no GPU here, leave it at cpu")
        try:
            config = AutoConfig.from_pretrained(folder)
            nested = config.get_text_config() is not config
            if nested and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                name = (config.architectures or [type(config).__name__])[0]
                raise UnfitTargetError(_WITHIN.format(name))
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        except UnfitTargetError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise UnfitTargetError(f"the target {folder} cannot be loaded ({error})") from error
        return cls(model.to(device), transfer_layer)

    def at_layer(self, transfer_layer: int) -> FrozenTarget:
        """The same weights with another transfer layer."""
        return FrozenTarget(self.model, transfer_layer)

    @property
    def num_upper_layers(self) -> int:
        """Number of layers t..L-1."""
        return self.num_layers - self.transfer_layer

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the target computes in."""
        return self.head_weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the target lies."""
        return self.head_weight.device

    @property
    def head_weight(self) -> Tensor:
        """LM head weight [vocabulary, d]."""
        weight: Tensor = self.model.lm_head.weight
        return weight

    def embed(self, token_ids: Tensor) -> Tensor:
        """Raw input embedding rows [..., d] of token ids [...]."""
        embedded: Tensor = self.model.model.embed_tokens(token_ids.to(self.device))
        return embedded

    @torch.no_grad()
    def prefix(self, token_ids: Tensor) -> Prefix:
        """Run the whole target over one sequence of token ids [n]."""
        caught = _Caught()
        with self._attention(_PREFIX):
            output = self.model.model(
                token_ids[None].to(self.device),
                use_cache=False,
                output_hidden_states=True,
                return_dict=True,
                caught=caught,
            )
        upper = range(self.transfer_layer, self.num_layers)
        return Prefix(
            hidden=output.hidden_states[self.transfer_layer][0],
            keys=torch.stack([caught.keys[layer].transpose(0, 1) for layer in upper]),
            values=torch.stack([caught.values[layer].transpose(0, 1) for layer in upper]),
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
        steps = pseudo.shape[2]
        positions = roots[:, :, None] + 1 + torch.arange(steps, device=pseudo.device)
        hidden = pseudo.flatten(1, 2).to(self.dtype)
        inner = self.model.model
        rotary = inner.rotary_emb(hidden, positions.flatten(1))
        rows = _Rows(roots, steps, prefixes, self.transfer_layer)
        with self._attention(_ROWS):
            for layer in inner.layers[self.transfer_layer :]:
                output = layer(
                    hidden,
                    attention_mask=None,
                    position_ids=positions.flatten(1),
                    past_key_values=None,
                    use_cache=False,
                    position_embeddings=rotary,
                    rows=rows,
                )
                hidden = output[0] if isinstance(output, tuple) else output
        normed: Tensor = inner.norm(hidden)
        return normed.view(pseudo.shape)

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        """Attention by one of ours for as long as this lasts."""
        configs = {
            id(part.config): part.config for part in self.model.modules() if hasattr(part, "config")
        }
        before = {key: config._attn_implementation for key, config in configs.items()}
        try:
            for config in configs.values():
                config._attn_implementation = name
            yield
        finally:
            for key, config in configs.items():
                config._attn_implementation = before[key]

    @torch.no_grad()
    def _probe(self) -> None:
        """Feed true hidden states as pseudo states: they must give the target's own logits.

        Raises:
            UnfitTargetError: they do not, or the target's layers do not take such rows at all.
        """
        tokens = torch.arange(_PROBE_TOKENS) * (self.vocab_size // _PROBE_TOKENS)
        try:
            prefix = self.prefix(tokens)
            roots = torch.tensor([[1, _PROBE_TOKENS - 4]], device=self.device)
            places = roots[:, :, None] + torch.arange(1, 4, device=self.device)
            shared = SharedPrefixes(prefix.keys[None], prefix.values[None])
            found = self.run_rows(prefix.hidden[places], roots, shared)[0] @ self.head_weight.T
            frozen = self.model(tokens[None].to(self.device)).logits[0][places[0]]
        except (AttributeError, TypeError, ValueError, RuntimeError, KeyError) as error:
            raise UnfitTargetError(
                f"drafting rows cannot run through the layers of {type(self.model).__name__} ({error})"
            ) from error
        # Half precision rounds twice on the way; what does not fit is off by much more.
        allowed = 1e-4 if self.dtype == torch.float32 else 5e-2
        difference = float((found - frozen).abs().max() / frozen.abs().max())
        if not difference <= allowed:
            raise UnfitTargetError(
                f"hidden transfer does not fit {type(self.model).__name__}: true hidden states give other "
                f"logits than the model's own (off by {difference:.1e} of the largest)"
            )


def _prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    caught: _Caught | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Stock attention that keeps what it attended to."""
    if caught is not None:
        caught.keys[module.layer_idx], caught.values[module.layer_idx] = key[0], value[0]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _row_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    rows: _Rows | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of pseudo rows: query [b, heads, roots * k, head_dim], key and value with kv_heads.

    Returns [b, roots * k, heads, head_dim], as transformers expects it.
    """
    if rows is None or softcap is not None:
        raise ValueError("its attention is not plain scaled dot products")
    batch, heads, count, dim = query.shape
    kv_heads, steps = key.shape[1], rows.steps
    num_roots, groups = count // steps, heads // kv_heads
    upper = module.layer_idx - rows.first_layer
    shared_key, shared_value = (
        part[:, upper].transpose(1, 2).to(query.dtype)
        for part in (rows.prefixes.keys, rows.prefixes.values)
    )
    scaled = query * (dim**-0.5 if scaling is None else scaling)
    # Queries of one KV head side by side: [b, kv, roots, k, groups, head_dim].
    scaled = scaled.view(batch, kv_heads, groups, num_roots, steps, dim).permute(0, 1, 3, 4, 2, 5)
    key, value = (part.view(batch, kv_heads, num_roots, steps, dim) for part in (key, value))
    length = shared_key.shape[2]
    scores = (scaled.flatten(2, 4) @ shared_key.transpose(-1, -2)).view(*scaled.shape[:-1], length)
    scores = scores + _prefix_bias(rows, length, sliding_window, scores.dtype)
    own = scaled.flatten(3, 4) @ key.transpose(-1, -2)
    own = own.unflatten(3, (steps, groups)) + _own_bias(steps, own)[:, None]
    weights = torch.cat([scores, own], dim=-1).softmax(dim=-1)
    mixed = (weights[..., :length].flatten(2, 4) @ shared_value).view(scaled.shape)
    mixed = mixed + (weights[..., length:].flatten(3, 4) @ value).view(scaled.shape)
    # [b, kv, roots, k, groups, dim] -> [b, roots * k, heads, dim]
    return mixed.permute(0, 2, 3, 1, 4, 5).reshape(batch, count, heads, dim), None


def _prefix_bias(rows: _Rows, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[b, 1, roots, k or 1, 1, length]: minus infinity where a row must not look."""
    places = torch.arange(length, device=rows.roots.device)
    roots = rows.roots[:, None, :, None, None, None]
    hidden = places > roots
    if window is not None:
        steps = torch.arange(1, rows.steps + 1, device=rows.roots.device)
        hidden = hidden | (places <= roots + steps[:, None, None] - window)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return bias.masked_fill_(hidden, float("-inf"))


def _own_bias(steps: int, like: Tensor) -> Tensor:
    """[k, k]: a row sees the earlier rows of its root and itself."""
    return torch.full((steps, steps), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)


AttentionInterface.register(_PREFIX, _prefix_attention)
AttentionInterface.register(_ROWS, _row_attention)
AttentionMaskInterface.register(_PREFIX, sdpa_mask)
