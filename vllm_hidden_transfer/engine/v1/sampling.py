# SPDX-License-Identifier: Apache-2.0
"""Verification with vLLM's stock sampler: only the rows that the walk visits, depth by depth.

Every visited row is sampled with the request's own parameters, random generator and output so far (the accepted path
included), exactly as stock decoding would sample it. That makes seeded requests equal to no speculation and penalties
exact on a path.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
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
        trees: of each request; None samples the root only, as does a request with ``logprob_token_ids``.
        root_rows: the row of ``logits`` that holds each request's root.

    Returns:
        The sampler output as a chain rejection sampler would give it ([requests, max tokens], padded), and the walk.
    """
    # Logprobs of given token ids come in a form that has no place for several tokens a step.
    root_only = metadata.logprob_token_ids or {}
    walk = VerificationWalk(
        [None if request in root_only else tree for request, tree in enumerate(trees)]
    )
    steps: list[tuple[list[int], SamplerOutput]] = []
    while walk.active:
        requests = walk.active
        rows = torch.tensor([root_rows[request] + walk.nodes[request] + 1 for request in requests])
        rows = rows.to(logits.device)
        here = metadata if walk.depth == 0 else _on_path(metadata, requests, walk, logits.device)
        output = sampler(logits=logits[rows], sampling_metadata=here)
        steps.append((requests, output))
        walk.advance(output.sampled_token_ids.flatten().tolist())
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
        logitsprocs=_processors_on_path(metadata.logitsprocs, requests, walk),
        # Requests with these two have no tree.
        thinking_budget_state_holder=None,
        logprob_token_ids=None,
    )


def _processors_on_path(
    processors: LogitsProcessors, requests: list[int], walk: VerificationWalk
) -> LogitsProcessors:
    """Stock's own processors for the rows of some requests that have accepted a path in this step.

    They keep their state by request index, so each is copied and its state picked by request.
    """
    result = LogitsProcessors()
    for processor in processors.non_argmax_invariant:
        if isinstance(processor, MinTokensLogitsProcessor):
            if processor.min_toks:
                result.non_argmax_invariant.append(_min_tokens(processor, requests, walk))
        elif isinstance(processor, LogitBiasLogitsProcessor):
            if processor.biases:
                result.non_argmax_invariant.append(_logit_bias(processor, requests))
        else:
            raise TypeError(f"{type(processor).__name__} cannot be applied to a tree")
    for processor in processors.argmax_invariant:
        if not isinstance(processor, MinPLogitsProcessor):
            raise TypeError(f"{type(processor).__name__} cannot be applied to a tree")
        if processor.min_p_count:
            picked = copy.copy(processor)
            picked.min_p = processor.min_p[requests]
            result.argmax_invariant.append(picked)
    return result


def _min_tokens(
    stock: MinTokensLogitsProcessor, requests: list[int], walk: VerificationWalk
) -> MinTokensLogitsProcessor:
    """min_tokens where the output and the path are still shorter than it."""
    masked: dict[int, set[int]] = {}
    restored: dict[int, set[int]] = {}
    for place, request in enumerate(requests):
        minimum, output, stop_tokens, structured = stock.min_toks.get(
            request, (0, (), set(), False)
        )
        if len(output) + len(walk.tokens[request]) < minimum:
            masked[place] = stop_tokens
            if structured:
                restored[place] = stop_tokens
    picked = copy.copy(stock)
    picked.logits_slice = _entries(masked, stock.device)
    picked.restore_logits_slice = _entries(restored, stock.device)
    return picked


def _logit_bias(stock: LogitBiasLogitsProcessor, requests: list[int]) -> LogitBiasLogitsProcessor:
    biases = {
        place: stock.biases[request]
        for place, request in enumerate(requests)
        if request in stock.biases
    }
    picked = copy.copy(stock)
    picked.biases = biases
    picked.logits_slice = _entries(biases, stock.device)
    values = [bias for entry in biases.values() for bias in entry.values()]
    picked.bias_tensor = torch.tensor(values, dtype=torch.float32, device=stock.device)
    return picked


def _entries(
    tokens: Mapping[int, Iterable[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, token ids) of all pairs, as the processors index logits."""
    pairs = [(row, token) for row, row_tokens in tokens.items() for token in row_tokens]
    rows, ids = torch.tensor(pairs, dtype=torch.int32, device=device).reshape(-1, 2).unbind(1)
    return rows, ids


def _combined(steps: list[tuple[list[int], SamplerOutput]], num_requests: int) -> SamplerOutput:
    """All depths as one output: tokens [requests, depths], logprobs [requests * depths, ...]."""
    if len(steps) == 1:
        return steps[0][1]
    tokens = steps[0][1].sampled_token_ids
    sampled = tokens.new_full((num_requests, len(steps)), PLACEHOLDER_TOKEN_ID)
    for depth, (requests, output) in enumerate(steps):
        sampled[requests, depth] = output.sampled_token_ids[:, 0]
    found = [
        (depth, requests, output.logprobs_tensors)
        for depth, (requests, output) in enumerate(steps)
        if output.logprobs_tensors is not None
    ]
    if not found:
        return SamplerOutput(sampled_token_ids=sampled, logprobs_tensors=None)
    # Beside a request that asks for given ids the root's are as many as it gave, deeper ones as many as others asked.
    width = max(tensors.logprobs.shape[-1] for _, _, tensors in found)
    first = found[0][2]
    shape = (num_requests, len(steps))
    ids = first.logprob_token_ids.new_zeros((*shape, width))
    values = first.logprobs.new_full((*shape, width), -torch.inf)
    ranks = first.selected_token_ranks.new_zeros(shape)
    for depth, requests, tensors in found:
        size = tensors.logprobs.shape[-1]
        ids[requests, depth, :size] = tensors.logprob_token_ids
        values[requests, depth, :size] = tensors.logprobs
        ranks[requests, depth] = tensors.selected_token_ranks
    logprobs = LogprobsTensors(*(part.flatten(0, 1) for part in (ids, values, ranks)))
    return SamplerOutput(sampled_token_ids=sampled, logprobs_tensors=logprobs)
