# SPDX-License-Identifier: Apache-2.0
"""Tree verification in vLLM's V2 model runner: thin overrides around ``super()``.

One step: positions become depths, attention gets the trees of the batch's slots, all rows are sampled and walked, the
accepted path is compacted, and the speculator leaves the next trees in the slots. Never ran on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_hidden_transfer.engine.announce import announce
from vllm_hidden_transfer.engine.settings import Settings
from vllm_hidden_transfer.engine.structure import check_model
from vllm_hidden_transfer.engine.v2.drafting import (
    DeviceDraftSource,
    HostDrafts,
    TreeSpeculator,
)
from vllm_hidden_transfer.engine.v2.slot_batch import SlotBatch
from vllm_hidden_transfer.engine.v2.slots import TreeSlots
from vllm_hidden_transfer.engine.v2.transfer_source import TransferSourceV2
from vllm_hidden_transfer.engine.v2.verify import TreeVerifier
from vllm_hidden_transfer.tree import TensorWalk

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.output import SamplerOutput
else:
    GPUModelRunner = object  # a mixin: the device's runner class comes after it


class TreeRunnerV2(GPUModelRunner):
    """Mixin for a V2 model runner. A subclass names the attention adapter of its device."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.settings = Settings.of(vllm_config)
        self.slots = TreeSlots(self.max_num_reqs, self.num_speculative_steps, device)
        self.draft_source = self.make_draft_source()
        # In place of the stand-in method's, which has nothing but buffers.
        self.speculator = TreeSpeculator(self)
        self.use_aux_hidden_state_outputs = self.draft_source.transfer_layer is not None
        self.last_rows = torch.zeros(0, dtype=torch.int64, device=device)
        """int64 [b]: the row of each request's last accepted token in the step's rows."""
        self.step_slots = self.last_rows
        """int64 [rows]: where the step's rows lie in the paged cache."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        layer = self.draft_source.transfer_layer
        check_model(self.model, layer)
        self.draft_source.on_target_loaded(self.model)
        if layer is not None:
            model: Any = self.model
            model.set_aux_hidden_state_layers((layer,))
        assert self.sampler is not None
        self.rejection_sampler = self.verifier = TreeVerifier(
            self.sampler, self.speculative_config, self.device, self.slots
        )
        announce(
            self.settings,
            self.draft_source.describe(),
            self.num_speculative_steps,
            self.model_config.dtype,
            self.attention_name,
            "V2",
            adaptive=False,
        )

    # What a device adapter gives.

    attention_name: str
    """How trees are attended, for the banner."""

    def set_batch_trees(self, batch: InputBatch) -> None:
        """Hand the trees of a batch, cut to the rows that were scheduled, to the attention metadata builder."""
        raise NotImplementedError

    def compact_accepted(self, roots: torch.Tensor, walk: TensorWalk) -> None:
        """Move keys and values of accepted paths to where decoding one by one would have written them, in all layers:
        a path's token at depth d belongs where the d-th row behind the root's was written (``step_slots``).

        Args:
            roots: int64 [b], the rows of the requests' roots in the last pass.
            walk: where their walks led.
        """
        raise NotImplementedError

    def draft_attention(
        self, batch: SlotBatch, positions: torch.Tensor
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Attention metadata and slots of a draft pass, by layer name; positions int64 [b, k]."""
        raise NotImplementedError

    def forget_drafts(self, unusable: torch.Tensor) -> None:
        """Undo what draft rows with NaN logits, bool [b, k], left behind in the cache."""
        raise NotImplementedError

    # Overrides.

    def make_draft_source(self) -> DeviceDraftSource:
        if self.settings.draft_source is None:
            assert self.settings.checkpoint is not None
            return TransferSourceV2(self, self.settings.checkpoint)
        source: Any = self.settings.source_class()(self)
        return source if hasattr(source, "propose_tensors") else HostDrafts(source, self)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            self.slots.reset(self.req_states.req_id_to_index[request.req_id])

    def prepare_attn(
        self, input_batch: InputBatch
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        # Slots come from linear positions, so stock goes first.
        block_tables, slot_mappings = super().prepare_attn(input_batch)
        self.step_slots = slot_mappings[0]
        self.set_batch_trees(input_batch)
        if input_batch.num_draft_tokens:
            input_batch.positions.index_add_(
                0, input_batch.logits_indices, self.slots.shift(input_batch)
            )
        return block_tables, slot_mappings

    def sample(
        self,
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        self.verifier.forget()
        sampled = super().sample(hidden_states, input_batch, grammar_output)
        walk = self.verifier.walk
        if walk is None:
            self.last_rows = input_batch.logits_indices
        else:
            roots = input_batch.logits_indices[input_batch.cu_num_logits[:-1].long()]
            self.compact_accepted(roots, walk)
            last = walk.rows.gather(1, walk.num_accepted[:, None])
            self.last_rows = roots + last[:, 0]
        return sampled
