# SPDX-License-Identifier: Apache-2.0
"""Tree verification in vLLM's V1 model runner: thin overrides around ``super()``.

One step: the scheduler's draft tokens are matched with the trees that made them, positions become depths, attention
gets the trees, the stock sampler walks them, the accepted path is compacted, and the draft source builds the next
trees. A step in which no request has drafts is a stock step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.outputs import SamplerOutput

from vllm_hidden_transfer.drafting.source import DraftBatch, DraftSource
from vllm_hidden_transfer.engine.announce import announce
from vllm_hidden_transfer.engine.settings import Settings
from vllm_hidden_transfer.engine.structure import check_model
from vllm_hidden_transfer.engine.v1.pace import Pace
from vllm_hidden_transfer.engine.v1.sampling import verify
from vllm_hidden_transfer.engine.v1.step import IntArray, Step
from vllm_hidden_transfer.engine.v1.text_source import TextSource
from vllm_hidden_transfer.patches import sampling_parameters, thinking_budgets
from vllm_hidden_transfer.tree import TokenTree, VerificationWalk, limit_runs, ramp

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

else:
    GPUModelRunner = object  # a mixin: the device's runner class comes after it


class UnusedProposer:
    """What vLLM's ``custom_class`` method loads. The runner drafts itself, because a custom class sees no hidden
    states; nothing calls this one's ``propose``."""

    def __init__(self, vllm_config: VllmConfig) -> None: ...

    def load_model(self, target: torch.nn.Module) -> None: ...

    def propose(self, *_: object, **__: object) -> list[list[int]]:
        raise RuntimeError("hidden_transfer drafts in its model runner, not here")


class TreeRunner(GPUModelRunner):
    """Mixin for a V1 model runner. A subclass names the attention adapter of its device."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        with sampling_parameters.built_in_processors():
            super().__init__(vllm_config, device)
        self.settings = Settings.of(vllm_config)
        self.draft_source = self.make_draft_source()
        self.trees: dict[str, TokenTree] = {}
        self.step = Step.empty()
        # Ranks that decide each for itself would decide differently and wait for each other for ever.
        adaptive = not self.settings.always_draft and self.parallel_config.world_size == 1
        passes = self.draft_source.runs_a_pass
        self.pace = Pace(self.num_spec_tokens, passes=passes) if adaptive else None
        # Where every step has a draft pass, nothing is looked up.
        self._shows_logits = self.draft_source.reads_logits and (adaptive or not passes)
        self.use_aux_hidden_state_outputs = self.draft_source.transfer_layer is not None
        # Near max_model_len stock puts zeros in place of all drafts; ours are cut by the scheduler instead.
        self.effective_drafter_max_model_len = self.max_model_len + self.num_spec_tokens + 1

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        check_model(self.model, self.draft_source.transfer_layer)
        self.draft_source.on_target_loaded(self.model)
        announce(
            self.settings,
            self.draft_source.describe(),
            self.num_spec_tokens,
            self.model_config.dtype,
            self.attention_name,
            "V1",
            adaptive=self.pace is not None,
        )

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)  # it may make the batch anew
        thinking_budgets.mend(self)

    # What a device adapter gives.

    attention_name: str
    """How trees are attended, for the banner."""

    def set_trees(self, trees: Sequence[TokenTree | None] | None, root_rows: IntArray) -> None:
        """Hand the trees of the next pass and the rows of their roots to the attention metadata builder; None for a
        stock pass."""
        raise NotImplementedError

    def compact(self, rows: IntArray, slots: IntArray) -> None:
        """Move the keys and values of rows of the last pass (int64 [m]) into slots of the paged cache (int64 [m])."""
        raise NotImplementedError

    def fit_to_scratch(
        self,
        trees: Sequence[TokenTree | None],
        first_positions: IntArray,
        rows_before: IntArray,
    ) -> list[TokenTree | None]:
        """Cut runs off trees that the device could not verify together in one pass.

        Args:
            trees: of each request of the pass.
            first_positions: int64 [requests], the position of each request's first row.
            rows_before: int64 [requests], its rows up to the root's, that one included.
        """
        raise NotImplementedError

    def make_transfer_source(self) -> DraftSource:
        """The draft source of the checkpoint in the settings."""
        raise NotImplementedError

    # Overrides.

    def make_draft_source(self) -> DraftSource:
        if self.settings.draft_source is not None:
            return cast(DraftSource, self.settings.source_class()(self))
        if self.settings.checkpoint is None:
            return TextSource(self.settings.sources, self.model_config.get_vocab_size())
        return self.make_transfer_source()

    def _get_eagle3_aux_layers_from_config(self) -> tuple[int, ...] | None:
        layer = self.draft_source.transfer_layer
        return None if layer is None else (layer,)

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> tuple[torch.Tensor, SpecDecodeMetadata | None, int]:
        started = time.perf_counter()
        outputs = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self.step = step = self._plan(scheduler_output, num_scheduled_tokens)
        step.started = started
        self._set_positions(step)
        self.set_trees(step.trees if step.has_trees else None, step.root_rows)
        return outputs

    def _plan(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray) -> Step:
        drafts = scheduler_output.scheduled_spec_decode_tokens
        request_ids = self.input_batch.req_ids
        num_rows = num_scheduled_tokens.astype(np.int64)
        if not drafts:
            rows_before = num_rows
            trees: list[TokenTree | None] = [None] * len(request_ids)
        else:
            tokens = [drafts.get(request_id) or () for request_id in request_ids]
            rows_before = num_rows - np.array([len(each) for each in tokens])
            trees = [
                self._scheduled_tree(request_id, each) if each else None
                for request_id, each in zip(request_ids, tokens, strict=True)
            ]
        first_positions = self.input_batch.num_computed_tokens_cpu[: len(request_ids)]
        first_positions = first_positions.astype(np.int64)
        if drafts:
            # Trees that an earlier step had no room for are in this pass too, beside those that were fitted since.
            trees = self.fit_to_scratch(trees, first_positions, rows_before)
        root_rows = np.cumsum(num_rows) - num_rows + rows_before - 1
        decoding = bool((rows_before == 1).all())
        return Step(trees, root_rows, first_positions + rows_before - 1, decoding)

    def _set_positions(self, step: Step) -> None:
        """Depths in place of vLLM's linear positions, at the rows of all trees."""
        sizes = np.array([0 if tree is None else len(tree) for tree in step.trees])
        if not sizes.any():
            return
        depths = np.concatenate([tree.depths for tree in step.trees if tree is not None])
        requests, nodes = ramp(sizes)
        rows = torch.from_numpy(step.root_rows[requests] + 1 + nodes)
        positions = torch.from_numpy(step.root_positions[requests] + depths)
        device = self.positions.device
        self.positions[rows.to(device)] = positions.to(device, self.positions.dtype)

    def _scheduled_tree(self, request_id: str, tokens: Sequence[int]) -> TokenTree:
        """The request's tree, cut to what was scheduled. Drafts that are not a tree of ours are a chain, which is
        what vLLM means by them."""
        tree = self.trees.pop(request_id, None)
        if tree is not None and tree.tokens[: len(tokens)].tolist() == list(tokens):
            return tree.truncated(len(tokens))
        return TokenTree.chain(tokens)

    def _sample(
        self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        step = self.step
        if logits is None:
            return super()._sample(None, None)
        # logits hold the last 1 + drafts rows of each request, one request after the other.
        sizes = np.ones(len(step.root_rows), dtype=np.int64)
        if spec_decode_metadata is not None:
            sizes += np.array(spec_decode_metadata.num_draft_tokens)
        if self._shows_logits and self.pace is None:
            self._show_logits(logits, step.root_rows, sizes)
        elif self._shows_logits and self.pace is not None:
            with self.pace.learning(step) as wanted:
                if wanted:
                    self._show_logits(logits, step.root_rows, sizes)
        if not step.has_trees:
            return super()._sample(logits, None)
        self.input_batch.update_async_output_token_ids()
        root_rows = (np.cumsum(sizes) - sizes).tolist()
        verified = verify(
            self.sampler, logits, self.input_batch.sampling_metadata, step.trees, root_rows
        )
        step.walk = verified.walk
        self._compact_accepted(step, verified.walk)
        return verified.output

    def _show_logits(self, logits: torch.Tensor, root_rows: IntArray, sizes: IntArray) -> None:
        """Let the draft source see the logits of each request's root and drafts, before a sampler changes them."""
        requests, places = ramp(sizes)
        rows = torch.from_numpy(root_rows[requests] + places)
        tokens = self.input_ids.gpu[rows.to(self.input_ids.gpu.device)]
        self.draft_source.observe_logits(tokens.cpu().numpy(), logits)

    def _compact_accepted(self, step: Step, walk: VerificationWalk) -> None:
        moved = [
            (request, depth, node)
            for request, tree in enumerate(step.trees)
            if tree is not None
            for depth, node in enumerate(tree.path(walk.nodes[request]).tolist(), start=1)
            if node != depth - 1
        ]
        if not moved:
            return
        requests, depths, nodes = np.array(moved).T
        table = self.input_batch.block_table[0]
        size, positions = table.block_size, step.root_positions[requests] + depths
        blocks = table.block_table.np[requests, positions // size].astype(np.int64)
        self.compact(step.root_rows[requests] + 1 + nodes, blocks * size + positions % size)

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: torch.Tensor | list[list[int]],
        sampling_metadata: object,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        spec_decode_metadata: object,
        common_attn_metadata: CommonAttentionMetadata,
        slot_mappings: object,
    ) -> list[list[int]]:
        self.set_trees(None, self.step.root_rows)
        self.step.attention = common_attn_metadata
        assert isinstance(sampled_token_ids, list)  # a tensor is for drafters that stay on a GPU
        requests = [request for request, tokens in enumerate(sampled_token_ids) if tokens]
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        lengths = self.input_batch.num_tokens_no_spec
        if self.pace is not None:
            self.pace.observe(self.step, self.input_batch.req_ids)
        hidden = None
        if aux_hidden_states is not None and requests:
            hidden = aux_hidden_states[0][torch.from_numpy(self.step.last_rows()[requests])]
        batch = DraftBatch(
            request_ids=[self.input_batch.req_ids[request] for request in requests],
            batch_rows=np.array(requests, dtype=np.int64),
            token_ids=[
                self.input_batch.token_ids_cpu[request, : lengths[request]] for request in requests
            ],
            hidden=hidden,
            budget=min(self.num_spec_tokens, scheduler_output.num_spec_tokens_to_schedule),
        )
        if self.pace is not None:
            proposed = self.pace.draft(self.draft_source, batch)
        else:
            proposed = self.draft_source.propose(batch) if requests else []
        usable = [
            (request, request_id, self._for_request(request_id, tree))
            for request, request_id, tree in zip(requests, batch.request_ids, proposed, strict=True)
            if len(tree)
        ]
        if not usable:
            return drafts
        rows = [request for request, *_ in usable]
        trees = self.fit_to_scratch(
            [tree for *_, tree in usable],
            lengths[rows].astype(np.int64) - 1,
            np.ones(len(rows), dtype=np.int64),
        )
        for (request, request_id, _), tree in zip(usable, trees, strict=True):
            assert tree is not None
            self.trees[request_id] = tree
            drafts[request] = tree.tokens.tolist()
        return drafts

    def map_adapters(self, batch_rows: NDArray[np.int64], rows_each: int) -> None:
        """Tell LoRA layers which rows of the next pass belong to which request; nothing without LoRA.

        Args:
            batch_rows: the requests of the pass, ascending, by their row in the batch.
            rows_each: rows of each of them.
        """
        if self.lora_config is None:
            return
        counts = np.zeros(self.input_batch.num_reqs, dtype=np.int32)
        counts[batch_rows] = rows_each
        self.set_active_loras(self.input_batch, counts, counts)

    def _for_request(self, request_id: str, tree: TokenTree) -> TokenTree:
        """What a request can use of its tree.

        A thinking budget counts tokens from step to step, and log-probabilities of given token ids come in a form that
        has no place for several tokens a step, so such a request gets no drafts. vLLM checks drafts against a grammar
        as a chain, so a request with one gets its most probable path.
        """
        params = self.requests[request_id].sampling_params
        if params is None:
            return tree
        if params.thinking_token_budget is not None or params.logprob_token_ids is not None:
            return tree.truncated(0)
        return tree if params.structured_outputs is None else limit_runs(tree, 1)

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        self.trees.pop(req_id, None)
        self.draft_source.forget(req_id)
        if self.pace is not None:
            self.pace.forget(req_id)
        super()._on_request_state_removed(req_id, req_state)
