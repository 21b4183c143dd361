# SPDX-License-Identifier: Apache-2.0
"""Two-pass hidden-transfer drafting inside the engine.

After verification, k pseudo hidden states a request enter the target's own layers t..L-1 as one more pass over the
same KV cache; the target's norm and LM head read a draft distribution off each (arXiv 2404.12022, section 3, with the
sampled token known, as in our token-conditioned maps).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger

from vllm_hidden_transfer.drafting.distributions import top_candidates
from vllm_hidden_transfer.drafting.source import DraftBatch
from vllm_hidden_transfer.transfer import load_checkpoint
from vllm_hidden_transfer.tree import TokenTree, most_probable_paths

if TYPE_CHECKING:
    from vllm_hidden_transfer.engine.cpu import TreeCPUModelRunner


logger = init_logger("vllm.hidden_transfer")


class TransferSource:
    """Drafts with the maps of a transfer checkpoint.

    Pseudo rows stand at the positions of the tokens to come. Their keys and values go into the request's own
    blocks, into slots that the next step writes before it reads them, or into scratch where no block is allocated.
    """

    def __init__(self, runner: TreeCPUModelRunner, checkpoint: str) -> None:
        self._runner = runner
        self.config, maps = load_checkpoint(checkpoint)
        dtype = runner.model_config.dtype
        self.maps = maps.to(device=runner.device, dtype=dtype).eval().requires_grad_(False)
        self.transfer_layer: int | None = self.config.transfer_layer
        self._temperatures = list(self.config.calibration.temperatures)
        self._slots = np.zeros((0, 0), dtype=np.int64)
        self.unusable_rows = 0
        """Draft rows so far whose logits were NaN or infinite."""

    def describe(self) -> str:
        """Mode, k and t."""
        form = {"token": "token-conditioned", "none": "published"}[self.config.conditioning]
        steps, layers = self.config.num_transfer_steps, self.config.target.num_hidden_layers
        return f"two-pass drafts, {form} maps, k = {steps}, t = {self.transfer_layer} of {layers}"

    @torch.inference_mode()
    def propose(self, batch: DraftBatch) -> list[TokenTree]:
        logits = self.draft_logits(batch)
        tokens, log_probabilities = top_candidates(logits, self._temperatures, batch.budget)
        self._drop_unusable(log_probabilities)
        return most_probable_paths(tokens, log_probabilities, batch.budget)

    def _drop_unusable(self, log_probabilities: np.ndarray) -> None:
        """Rows with NaN or infinite logits give no drafts (the tree builder leaves them out): count them, say so
        once, and clear their keys and values, because the kernel reads whole blocks and 0 x NaN is NaN."""
        rows = np.isnan(log_probabilities[:, :, 0])
        unusable = int(rows.sum())
        if not unusable:
            return
        self._runner.clear(self._slots[rows])
        if not self.unusable_rows:
            logger.warning(
                "hidden_transfer: the draft pass gave NaN or infinite logits; those drafts are dropped and the "
                "output stays exact, but expect fewer accepted drafts. This is said once."
            )
        self.unusable_rows += unusable

    def draft_logits(self, batch: DraftBatch) -> torch.Tensor:
        """The draft pass: logits [requests, k, vocabulary] for the depths 1..k of every request's tree."""
        assert batch.hidden is not None
        model = self._model()
        steps = self.config.num_transfer_steps
        sampled = torch.tensor([int(tokens[-1]) for tokens in batch.token_ids])
        self._runner.map_adapters(batch.batch_rows, 1)
        embedding = model.embed_tokens(sampled.to(batch.hidden.device))
        pseudo = self.maps(batch.hidden, embedding)
        # Row 1 stands where the sampled token will.
        firsts = np.array([len(tokens) - 1 for tokens in batch.token_ids])
        positions = firsts[:, None] + np.arange(steps)
        metadata, slots = self._attention(batch, firsts, steps)
        last = self._runner.max_model_len - 1
        rope = torch.from_numpy(positions.clip(max=last).ravel())
        self._runner.map_adapters(batch.batch_rows, steps)
        hidden: torch.Tensor = pseudo.flatten(0, 1)
        residual: torch.Tensor | None = None
        with set_forward_context(
            metadata, self._runner.vllm_config, num_tokens=len(hidden), slot_mapping=slots
        ):
            for layer in model.layers[self.transfer_layer :]:
                hidden, residual = layer(rope, hidden, residual)
        hidden, _ = model.norm(hidden, residual)
        logits = self._runner.model.compute_logits(hidden)
        return logits.unflatten(0, (len(firsts), steps))

    def _model(self) -> Any:
        """The decoder stack inside vLLM's ``...ForCausalLM``."""
        return self._runner.model.model

    def _attention(
        self, batch: DraftBatch, firsts: np.ndarray, steps: int
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Stock attention metadata of the draft pass, and the slots of its rows, by layer name."""
        runner = self._runner
        table = runner.input_batch.block_table[0]
        size = table.block_size
        lengths = firsts + steps
        blocks = np.zeros((len(firsts), -(-int(lengths.max()) // size)), dtype=np.int32)
        scratch = iter(runner.store.scratch)
        for request, row in enumerate(batch.batch_rows.tolist()):
            allocated = min(int(table.num_blocks_per_row[row]), blocks.shape[1])
            blocks[request, :allocated] = table.block_table.np[row, :allocated]
            for missing in range(allocated, -(-int(lengths[request]) // size)):
                blocks[request, missing] = next(scratch)
        positions = firsts[:, None] + np.arange(steps)
        slots = np.take_along_axis(blocks, positions // size, axis=1) * size + positions % size
        self._slots = slots
        starts = torch.arange(0, len(firsts) * steps + 1, steps, dtype=torch.int32)
        assert runner.step.attention is not None
        common = replace(
            runner.step.attention,
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.from_numpy(lengths.astype(np.int32)),
            num_reqs=len(firsts),
            num_actual_tokens=len(firsts) * steps,
            max_query_len=steps,
            max_seq_len=int(lengths.max()),
            block_table_tensor=torch.from_numpy(blocks),
            slot_mapping=torch.from_numpy(slots.ravel().astype(np.int64)),
        )
        return runner.draft_metadata(common)
