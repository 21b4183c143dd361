# SPDX-License-Identifier: Apache-2.0
"""The draft pass of two-pass hidden transfer, as both model runners run it.

After verification, k pseudo hidden states a request enter the target's own layers t..L-1 as one more pass over the
same KV cache; the target's norm and LM head (``draft_head``) read a draft distribution off each (arXiv 2404.12022,
section 3, with the sampled token known, as in our token-conditioned maps). Where their rows attend and where their keys
and values lie is the runner's to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_hidden_transfer.checkpoint.maps import load_checkpoint
from vllm_hidden_transfer.drafting.bigram import BigramTables

if TYPE_CHECKING:
    from vllm.config import VllmConfig


logger = init_logger("vllm.hidden_transfer")


class DraftPass:
    """The maps of a transfer checkpoint in front of a target's upper layers."""

    def __init__(self, checkpoint: str, vllm_config: VllmConfig, device: torch.device) -> None:
        self.config, maps = load_checkpoint(checkpoint)
        dtype = vllm_config.model_config.dtype
        self.maps = maps.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.bigram: BigramTables | None = None
        """Re-weights drafts, once the target is loaded."""
        self._vllm_config = vllm_config

    def on_target_loaded(self, model: Any) -> None:
        """Make the tables of the bigram re-weighting from vLLM's ``...ForCausalLM``, where the maps have one."""
        if self.maps.bigram is None:
            return
        # A LoRA adapter's wrapper wants to know whose rows it is given.
        parts = (model.model.embed_tokens, model.lm_head)
        embed, head = (getattr(part, "base_layer", part) for part in parts)
        try:
            self.bigram = BigramTables.of(
                self.maps.bigram,
                self.config.target.vocab_size,
                embed,
                # An LM head refuses to be looked up, but under tensor parallelism only a look-up finds its rows.
                lambda ids: VocabParallelEmbedding.forward(head, ids),
            )
        except NotImplementedError:
            logger.warning(
                "drafts are not re-weighted by bigrams and are accepted a little less often: the quantisation "
                "of this target's LM head does not hand out its rows"
            )

    @property
    def steps(self) -> int:
        """Transfer steps k, the pseudo rows of a request."""
        return self.config.num_transfer_steps

    def describe(self) -> str:
        """Mode, k and t."""
        form = {"token": "token-conditioned", "none": "published"}[self.config.conditioning]
        layers = self.config.target.num_hidden_layers
        bigram = f" with bigrams of rank {self.maps.bigram_rank}" if self.maps.bigram else ""
        return (
            f"two-pass drafts, {form} maps{bigram}, k = {self.steps}, "
            f"t = {self.config.transfer_layer} of {layers}"
        )

    def pseudo_states(
        self, model: Any, hidden: torch.Tensor, sampled: torch.Tensor
    ) -> torch.Tensor:
        """Pseudo hidden states [b, k, d].

        Args:
            model: vLLM's ``...ForCausalLM``.
            hidden: [b, d], what entered layer t at the token before the root.
            sampled: int64 [b], the root's token.
        """
        return self.maps(hidden, model.model.embed_tokens(sampled))

    def states(
        self,
        model: Any,
        pseudo: torch.Tensor,
        positions: torch.Tensor,
        attention: tuple[dict[str, Any], dict[str, torch.Tensor]],
    ) -> torch.Tensor:
        """What the LM head reads, [b, k, d] after the last norm, of the depths 1..k.

        Args:
            model: vLLM's ``...ForCausalLM``.
            pseudo: [b, k, d].
            positions: int64 [b * k], where the rows stand for RoPE.
            attention: metadata and slots of the rows, by layer name.
        """
        hidden: torch.Tensor = pseudo.flatten(0, 1)
        residual: torch.Tensor | None = None
        metadata, slots = attention
        with set_forward_context(
            metadata, self._vllm_config, num_tokens=len(hidden), slot_mapping=slots
        ):
            for layer in model.model.layers[self.config.transfer_layer :]:
                hidden, residual = layer(positions, hidden, residual)
        hidden, _ = model.model.norm(hidden, residual)
        return hidden.unflatten(0, pseudo.shape[:2])
