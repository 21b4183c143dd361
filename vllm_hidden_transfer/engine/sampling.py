# SPDX-License-Identifier: Apache-2.0
"""Verification with vLLM's stock sampler: only the rows that the walk visits, depth by depth.

Every visited row is sampled with the request's own parameters, random generator and output so far (the accepted path
included), exactly as stock decoding would sample it. That makes seeded requests equal to no speculation and penalties
exact on a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors, MinTokensLogitsProcessor
from vllm.v1.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.sample.sampler import Sampler

from vllm_hidden_transfer.tree import TokenTree, VerificationWalk


@dataclass(frozen=True)
class Verified:
    """What a verification step found."""

    output: SamplerOutput
    walk: VerificationWalk


def verify(
    sampler: Sampler,
    logits: torch.Tensor,
    metadata: SamplingMetadata,
    trees: Sequence[TokenTree | None],
    root_rows: Sequence[int],
) -> Verified:
    """Walk all trees of a step.

    Args:
        sampler: vLLM's sampler.
        logits: [rows, vocabulary], the target's logits of each request's root and nodes, in the order of the rows.
        metadata: vLLM's sampling metadata, one entry a request.
        trees: of each request; None samples the root only.
        root_rows: the row of ``logits`` that holds each request's root.

    Returns:
        The sampler output as a chain rejection sampler would give it ([requests, max tokens], padded), and the walk.
    """
    walk = VerificationWalk(trees)
    steps: list[tuple[list[int], SamplerOutput]] = []
    # Full-vocabulary and per-token logprobs have no row form in stock speculation: accept nothing then.
    root_only = metadata.max_num_logprobs == -1 or bool(metadata.logprob_token_ids)
    while walk.active:
        requests = walk.active
        rows = torch.tensor([root_rows[request] + walk.nodes[request] + 1 for request in requests])
        rows = rows.to(logits.device)
        here = metadata if walk.depth == 0 else _on_path(metadata, requests, walk, logits.device)
        output = sampler(logits=logits[rows], sampling_metadata=here)
        steps.append((requests, output))
        walk.advance(output.sampled_token_ids.flatten().tolist())
        if root_only:
            walk.stop()
    return Verified(_combined(steps, len(trees)), walk)


def _on_path(
    metadata: SamplingMetadata,
    requests: list[int],
    walk: VerificationWalk,
    device: torch.device,
) -> SamplingMetadata:
    """The metadata of some requests, with what each has accepted on its path so far as its output."""
    index = torch.tensor(requests, device=device)

    def pick(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[index]

    outputs = metadata.output_token_ids
    if outputs:
        outputs = [[*outputs[request], *walk.tokens[request]] for request in requests]
    return replace(
        metadata,
        temperature=pick(metadata.temperature),
        top_p=pick(metadata.top_p),
        top_k=pick(metadata.top_k),
        generators={
            place: metadata.generators[request]
            for place, request in enumerate(requests)
            if request in metadata.generators
        },
        prompt_token_ids=pick(metadata.prompt_token_ids),
        frequency_penalties=pick(metadata.frequency_penalties),
        presence_penalties=pick(metadata.presence_penalties),
        repetition_penalties=pick(metadata.repetition_penalties),
        output_token_ids=outputs,
        spec_token_ids=None,
        allowed_token_ids_mask=pick(metadata.allowed_token_ids_mask),
        bad_words_token_ids={
            place: metadata.bad_words_token_ids[request]
            for place, request in enumerate(requests)
            if request in metadata.bad_words_token_ids
        },
        logitsprocs=_processors_on_path(metadata.logitsprocs, requests, walk.depth),
    )


def _processors_on_path(
    processors: LogitsProcessors, requests: list[int], accepted: int
) -> LogitsProcessors:
    """Stock's processors keep their state by request index; of those that vLLM allows with speculation, only
    min_tokens has any, and it is applied here by hand."""
    result = LogitsProcessors()
    for processor in processors.non_argmax_invariant:
        if isinstance(processor, MinTokensLogitsProcessor) and processor.min_toks:
            result.non_argmax_invariant.append(_MinTokensOnPath(processor, requests, accepted))
    return result


class _MinTokensOnPath(LogitsProcessor):
    """min_tokens for the rows of some requests that have accepted some tokens in this step."""

    def __init__(self, stock: MinTokensLogitsProcessor, requests: list[int], accepted: int) -> None:
        self._masked = [
            (place, sorted(stop_tokens))
            for place, request in enumerate(requests)
            if request in stock.min_toks
            for minimum, output, stop_tokens, _ in [stock.min_toks[request]]
            if len(output) + accepted < minimum
        ]

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: object) -> None:
        """Nothing to update: this processor lives for one depth."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for place, stop_tokens in self._masked:
            logits[place, stop_tokens] = -float("inf")
        return logits


def _combined(steps: list[tuple[list[int], SamplerOutput]], num_requests: int) -> SamplerOutput:
    """All depths as one output: tokens [requests, depths], logprobs [requests * depths, ...]."""
    if len(steps) == 1:
        return steps[0][1]
    first = steps[0][1]
    sampled = first.sampled_token_ids.new_full((num_requests, len(steps)), PLACEHOLDER_TOKEN_ID)
    parts: list[torch.Tensor] | None = None
    if first.logprobs_tensors is not None:
        parts = [
            part.new_zeros((num_requests, len(steps), *part.shape[1:]))
            for part in first.logprobs_tensors[:3]
        ]
    for depth, (requests, output) in enumerate(steps):
        sampled[requests, depth] = output.sampled_token_ids[:, 0]
        if parts is not None:
            assert output.logprobs_tensors is not None
            for part, values in zip(parts, output.logprobs_tensors[:3], strict=True):
                part[requests, depth] = values
    logprobs = None if parts is None else LogprobsTensors(*(part.flatten(0, 1) for part in parts))
    return SamplerOutput(sampled_token_ids=sampled, logprobs_tensors=logprobs)
