# SPDX-License-Identifier: Apache-2.0
"""Two-pass hidden-transfer drafting under the V1 runner: ``draft_pass`` on its batch and block table."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.logger import init_logger

from vllm_hidden_transfer.drafting import lookup
from vllm_hidden_transfer.drafting.distributions import DraftCandidates, candidates
from vllm_hidden_transfer.drafting.source import DraftBatch, DraftSource
from vllm_hidden_transfer.engine.announce import UNUSABLE_DRAFTS
from vllm_hidden_transfer.engine.draft_head import DraftHead
from vllm_hidden_transfer.engine.draft_pass import DraftPass
from vllm_hidden_transfer.engine.v1.text_source import TextSource
from vllm_hidden_transfer.tree import TokenTree, draft_blocks, most_probable, path_major

if TYPE_CHECKING:
    from vllm_hidden_transfer.engine.cpu import TreeCPUModelRunner


logger = init_logger("vllm.hidden_transfer")


class TransferSource(DraftSource):
    """Drafts with the maps of a transfer checkpoint, and what prompt lookup copies mixed in.

    Pseudo rows stand at the positions of the tokens to come. Their keys and values go into the request's own
    blocks, into slots that the next step writes before it reads them, or into scratch where no block is allocated.
    Where there is no scratch left, a request drafts as deep as its own blocks reach.

    Args:
        runner: whose batch is drafted for.
        checkpoint: folder of the transfer checkpoint.
        sources: what there is besides the maps: "lookup", which is mixed in and looked up where a pass does not pay,
            and "recycling", which is only looked up.
    """

    def __init__(
        self,
        runner: TreeCPUModelRunner,
        checkpoint: str,
        sources: Collection[str] = ("lookup",),
    ) -> None:
        self._runner = runner
        self._copies = "lookup" in sources
        self._pass = DraftPass(checkpoint, runner.vllm_config, runner.device)
        self.config = self._pass.config
        self._head = DraftHead(checkpoint, self.config, runner.device)
        self.transfer_layer = self.config.transfer_layer
        self._temperatures = torch.tensor(
            self.config.calibration.temperatures, dtype=torch.float32, device=runner.device
        )
        self._text: TextSource | None = None
        if beside := [source for source in sources if source != "maps"]:
            self._text = TextSource(beside, self.config.target.vocab_size)
            self.reads_logits = self._text.reads_logits
        self._slots = np.zeros((0, 0), dtype=np.int64)
        self._homeless = np.zeros((0, 0), dtype=np.bool_)
        self.unusable_rows = 0
        """Draft rows so far whose logits were NaN or infinite."""

    def describe(self) -> str:
        copies = "" if self._copies else ", no prompt lookup"
        return self._pass.describe() + self._head.describe() + copies

    def on_target_loaded(self, model: Any) -> None:
        self._pass.on_target_loaded(model)
        self._head.on_target_loaded(model)

    def look_up(self, batch: DraftBatch) -> list[TokenTree] | None:
        return None if self._text is None else self._text.look_up(batch)

    def observe_logits(self, tokens: NDArray[np.integer], logits: torch.Tensor) -> None:
        if self._text is not None:
            self._text.observe_logits(tokens, logits)

    def forget(self, request_id: str) -> None:
        if self._text is not None:
            self._text.forget(request_id)

    @torch.inference_mode()
    def propose(self, batch: DraftBatch) -> list[TokenTree]:
        columns = self._head.columns(batch.token_ids)
        logits = self.draft_logits(batch, columns)
        found = candidates(logits, self._temperatures, batch.budget, self._pass.bigram, columns)
        copied = None
        if self._copies:
            copied = lookup.mixed_in(lookup.look_up(batch.token_ids), lookup.SHARES)
        trees = most_probable(self._usable(found), batch.budget, copied)
        return path_major(trees).on_host()

    def _usable(self, found: DraftCandidates) -> DraftCandidates:
        """The candidates without those of rows that mean nothing.

        A row without a block of its own has seen what others wrote. One with NaN or infinite logits is counted and told
        of once, and its keys and values are cleared, because the kernel reads whole blocks and 0 x NaN is NaN."""
        homeless = torch.from_numpy(self._homeless)
        broken = found.broken & ~homeless
        unusable = int(broken.sum())
        if unusable:
            self._runner.clear(torch.from_numpy(self._slots)[broken.cpu()])
            if not self.unusable_rows:
                logger.warning(UNUSABLE_DRAFTS)
            self.unusable_rows += unusable
        return found.without(homeless) if homeless.any() else found

    def draft_logits(self, batch: DraftBatch, columns: torch.Tensor | None) -> torch.Tensor:
        """The draft pass: logits [requests, k, columns] for the depths 1..k of every request's tree.

        ``columns`` says which tokens they are of, int64 [requests, columns]; None for the whole vocabulary.
        """
        assert batch.hidden is not None
        runner, steps = self._runner, self._pass.steps
        sampled = torch.tensor([int(tokens[-1]) for tokens in batch.token_ids])
        runner.map_adapters(batch.batch_rows, 1)
        pseudo = self._pass.pseudo_states(
            runner.model, batch.hidden, sampled.to(batch.hidden.device)
        )
        # Row 1 stands where the sampled token will.
        firsts = np.array([len(tokens) - 1 for tokens in batch.token_ids])
        positions = firsts[:, None] + np.arange(steps)
        attention = self._attention(batch.batch_rows, positions)
        rope = torch.from_numpy(positions.clip(max=runner.max_model_len - 1).ravel())
        runner.map_adapters(batch.batch_rows, steps)
        states = self._pass.states(runner.model, pseudo, rope, attention)
        return self._head.logits(runner.model, states, columns)

    def _attention(
        self, batch_rows: np.ndarray, positions: np.ndarray
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Stock attention metadata of the draft pass, and the slots of its rows, by layer name."""
        runner = self._runner
        table = runner.input_batch.block_table[0]
        size = table.block_size
        num_requests, steps = positions.shape
        lengths = positions[:, -1] + 1
        blocks, homed = draft_blocks(
            table.block_table.np[batch_rows],
            table.num_blocks_per_row[batch_rows],
            lengths,
            size,
            runner.store.scratch,
        )
        slots = np.take_along_axis(blocks, positions // size, axis=1) * size + positions % size
        self._slots = slots
        self._homeless = positions >= homed[:, None] * size
        starts = torch.arange(0, num_requests * steps + 1, steps, dtype=torch.int32)
        assert runner.step.attention is not None
        common = replace(
            runner.step.attention,
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.from_numpy(lengths.astype(np.int32)),
            num_reqs=num_requests,
            num_actual_tokens=num_requests * steps,
            max_query_len=steps,
            max_seq_len=int(lengths.max()),
            block_table_tensor=torch.from_numpy(blocks.astype(np.int32)),
            slot_mapping=torch.from_numpy(slots.ravel()),
        )
        return runner.draft_metadata(common)
