# SPDX-License-Identifier: Apache-2.0
"""The walk and the sampler in isolation, by exact enumeration on small vocabularies: no samples, no false alarms.

The walk is fed every token that the target could sample at every node, each weighted by its probability under the
distribution of the row that the walk stands on. What is emitted must have the target's own distribution over whole
sequences, to machine precision, whatever the trees are. ``verify`` then has to show stock's sampler exactly what plain
decoding of the same tokens would show it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from vllm_hidden_transfer.engine.v1.sampling import Verified, verify
from vllm_hidden_transfer.tree import ROOT, TokenTree, VerificationWalk

Text = tuple[int, ...]
Distribution = dict[Text, float]
Policy = Callable[[Text], TokenTree | None]
"""The tree of a step, from all tokens before it."""

PRECISION = 1e-12
MOST_CALLS = 20
"""More than any tree here is deep."""


def examples(count: int) -> settings:
    """The same examples in every run."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


@dataclass(frozen=True)
class Target:
    """A language model as a table: the probabilities of the next token after any text."""

    vocabulary: int
    seed: int
    sparse: bool = False
    """Whether some tokens are impossible after some texts."""

    def after(self, text: Text) -> list[float]:
        rng = np.random.default_rng([self.seed, len(text), *text])
        weights = rng.dirichlet(np.ones(self.vocabulary))
        if self.sparse:
            weights *= rng.random(self.vocabulary) < 0.6
            weights[int(rng.integers(self.vocabulary))] += 0.1
        return (weights / weights.sum()).tolist()

    def texts(self, length: int) -> Distribution:
        """The probability of every text of this length."""
        found: Distribution = {(): 1.0}
        for _ in range(length):
            found = {
                (*text, token): probability * next_probability
                for text, probability in found.items()
                for token, next_probability in enumerate(self.after(text))
            }
        return found


def total_variation(one: Mapping[Any, float], other: Mapping[Any, float]) -> float:
    return sum(abs(one.get(key, 0) - other.get(key, 0)) for key in {*one, *other}) / 2


def steps(
    trees: Sequence[TokenTree | None],
    targets: Sequence[Target],
    prefixes: Sequence[Text],
    walk_class: type[VerificationWalk] = VerificationWalk,
) -> Iterator[tuple[tuple[Text, ...], float]]:
    """Every outcome of one verification step of a batch, with its probability.

    At each depth the walk gets every combination of tokens, weighted by the rows of the nodes on which it stands.
    """
    deepest = max(0 if tree is None else tree.max_depth for tree in trees)
    histories: list[tuple[list[tuple[int, ...]], float]] = [([], 1.0)]
    while histories:
        history, probability = histories.pop()
        walk = walk_class(trees)
        for sampled in history:
            walk.advance(sampled)
        if not walk.active:
            yield tuple(tuple(tokens) for tokens in walk.tokens), probability
            continue
        assert len(history) <= deepest, "the walk goes on below its tree"
        rows = []
        for request in walk.active:
            tree, node = trees[request], walk.nodes[request]
            path = () if tree is None else tuple(tree.tokens[tree.path(node)].tolist())
            row = targets[request].after(prefixes[request] + path)
            rows.append([(token, p) for token, p in enumerate(row) if p > 0])
        for combination in itertools.product(*rows):
            tokens = tuple(token for token, _ in combination)
            weight = math.prod(p for _, p in combination)
            histories.append(([*history, tokens], probability * weight))


def emitted(
    policy: Policy,
    target: Target,
    length: int,
    walk_class: type[VerificationWalk] = VerificationWalk,
) -> Distribution:
    """The distribution of the first ``length`` tokens that steps with these trees emit."""
    finished: defaultdict[Text, float] = defaultdict(float)
    unfinished: dict[Text, float] = {(): 1.0}
    while unfinished:
        after: defaultdict[Text, float] = defaultdict(float)
        for text, probability in unfinished.items():
            for (tokens,), weight in steps([policy(text)], [target], [text], walk_class):
                longer = text + tokens
                if len(longer) < length:
                    after[longer] += probability * weight
                else:
                    finished[longer[:length]] += probability * weight
        unfinished = dict(after)
    return dict(finished)


def once(tree: TokenTree | None) -> Policy:
    """A tree for the first step, plain sampling afterwards."""
    return lambda text: None if text else tree


def tree_of(tokens: Sequence[int], parents: Sequence[int]) -> TokenTree:
    return TokenTree(np.array(tokens, dtype=np.int64), np.array(parents, dtype=np.int64))


def full_tree(vocabulary: int, depth: int) -> TokenTree:
    return TokenTree.from_paths(list(itertools.product(range(vocabulary), repeat=depth)))


def drafted(target: Target, text: Text, depth: int, best: bool) -> TokenTree:
    """A chain of the target's most (or least) probable tokens, each with a sibling: trees that know the target."""
    tokens: list[int] = []
    parents: list[int] = []
    node = ROOT
    for _ in range(depth):
        order = np.argsort(target.after(text))
        token, sibling = order[[-1, -2]] if best else order[[0, 1]]
        tokens += [int(sibling), int(token)]
        parents += [node, node]
        node = len(tokens) - 1
        text = (*text, int(token))
    return tree_of(tokens, parents)


@st.composite
def trees(draw: st.DrawFn, vocabulary: int, max_nodes: int = 10) -> TokenTree:
    """Any tree, equal siblings and a token that is never sampled included."""
    size = draw(st.integers(0, max_nodes))
    parents = [draw(st.integers(ROOT, node - 1)) for node in range(size)]
    tokens = draw(st.lists(st.integers(0, vocabulary), min_size=size, max_size=size))
    return tree_of(tokens, parents)


NAMED: dict[str, TokenTree | None] = {
    "none": None,
    "empty": tree_of([], []),
    "one node": tree_of([1], [ROOT]),
    "chain": TokenTree.chain([0, 1, 2]),
    "chain longer than the text": TokenTree.chain([2, 1, 0, 1, 2, 0]),
    "star": tree_of([0, 1, 2], [ROOT] * 3),
    "full": full_tree(3, 4),
    "never sampled": tree_of([3, 4, 3, 0], [ROOT, ROOT, 0, 1]),
    "equal siblings": tree_of([1, 1, 1, 0, 0, 2], [ROOT, ROOT, ROOT, 0, 1, 2]),
    "equal siblings, the first without children": tree_of([1, 1, 0, 2], [ROOT, ROOT, 1, 2]),
    "equal subtrees": tree_of([0, 1, 0, 1, 2, 2], [ROOT, 0, ROOT, 2, 1, 3]),
    "one token everywhere": tree_of([1] * 7, [ROOT, ROOT, 0, 0, 1, 2, 5]),
    "not in order of depth": tree_of([0, 0, 1, 1, 2, 2], [ROOT, 0, 1, ROOT, 0, 3]),
}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_one_step_of_hostile_trees(name: str, sparse: bool) -> None:
    """One step with the tree, then plain sampling: total variation of whole texts below 1e-12."""
    for seed in range(3):
        target = Target(3, seed, sparse)
        found = emitted(once(NAMED[name]), target, 4)
        assert sum(found.values()) == pytest.approx(1, abs=PRECISION)
        assert total_variation(found, target.texts(4)) < PRECISION


@examples(60)
@given(st.data(), st.integers(3, 5), st.integers(0, 2**16), st.booleans())
def test_one_step_of_any_tree(
    data: st.DataObject, vocabulary: int, seed: int, sparse: bool
) -> None:
    target = Target(vocabulary, seed, sparse)
    found = emitted(once(data.draw(trees(vocabulary))), target, 3)
    assert total_variation(found, target.texts(3)) < PRECISION


@examples(40)
@given(st.data(), st.integers(0, 2**16), st.booleans())
def test_steps_whose_trees_depend_on_the_text(data: st.DataObject, seed: int, sparse: bool) -> None:
    """The tree of every step is another one for every text so far."""
    target = Target(3, seed, sparse)
    choice = data.draw(st.lists(trees(3, max_nodes=6), min_size=2, max_size=5))

    def policy(text: Text) -> TokenTree:
        return choice[int(np.random.default_rng([seed, *text]).integers(len(choice)))]

    assert total_variation(emitted(policy, target, 4), target.texts(4)) < PRECISION


@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_trees_that_know_the_target(best: bool, sparse: bool) -> None:
    """Drafts by the target's own probabilities: the likeliest tokens, and the least likely (impossible ones too)."""
    for seed in range(4):
        target = Target(4, seed, sparse)
        policy = partial(drafted, target, depth=3, best=best)
        found = emitted(policy, target, 4)
        assert total_variation(found, target.texts(4)) < PRECISION


@examples(25)
@given(st.lists(trees(3, max_nodes=4) | st.none(), min_size=2, max_size=3), st.integers(0, 2**16))
def test_requests_of_a_batch_are_independent(batch: list[TokenTree | None], seed: int) -> None:
    """The joint distribution of a batch's outcomes is the product of what each request would emit alone."""
    targets = [Target(2, seed + request) for request in range(len(batch))]
    prefixes: list[Text] = [(0,) * request for request in range(len(batch))]
    joint: defaultdict[tuple[Text, ...], float] = defaultdict(float)
    for outcome, probability in steps(batch, targets, prefixes):
        joint[outcome] += probability
    alone = [
        {tokens: p for (tokens,), p in steps([tree], [target], [prefix])}
        for tree, target, prefix in zip(batch, targets, prefixes, strict=True)
    ]
    product = {
        tuple(tokens for tokens, _ in outcome): float(np.prod([p for _, p in outcome]))
        for outcome in itertools.product(*(one.items() for one in alone))
    }
    assert total_variation(joint, product) < PRECISION


class TakesADraft(VerificationWalk):
    """Wrong: takes a draft that was not sampled."""

    def advance(self, sampled: Sequence[int]) -> None:
        super().advance([0 if token == 1 else token for token in sampled])


class ForgetsTheBonus(VerificationWalk):
    """Wrong: drops the token with which the walk left the tree, so that drafts get a second chance."""

    def advance(self, sampled: Sequence[int]) -> None:
        super().advance(sampled)
        for request, tokens in enumerate(self.tokens):
            if request not in self.active and len(tokens) > 1:
                tokens.pop()


class StaysAtTheRoot(VerificationWalk):
    """Wrong: samples the second token from the root's row again."""

    def advance(self, sampled: Sequence[int]) -> None:
        if self.depth:
            self.active = []
            return
        super().advance(sampled)
        self.nodes = [ROOT] * len(self.nodes)
        for tokens in self.tokens:
            tokens += tokens


@pytest.mark.parametrize("walk_class", [TakesADraft, ForgetsTheBonus, StaysAtTheRoot])
def test_the_measure_sees_wrong_walks(walk_class: type[VerificationWalk]) -> None:
    """Three wrong walks are off by more than a percent, so the tests above can fail."""
    target = Target(3, 0)
    found = emitted(lambda text: NAMED["chain"], target, 3, walk_class)
    assert total_variation(found, target.texts(3)) > 0.01


# --- verify() with stock's sampler -------------------------------------------------------------------------------


@dataclass
class Request:
    """What a user asked for, and what was there before this step."""

    params: SamplingParams
    prompt: list[int]
    output: list[int]
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Processing:
    """Processors take these from vLLM's configuration."""

    config: Any
    device: torch.device


CPU = Processing(
    SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=16)), torch.device("cpu")
)


def metadata_of(requests: Sequence[Request], vocabulary: int) -> SamplingMetadata:
    """vLLM's metadata for a batch, as its InputBatch makes it: what nobody asked for is None or empty."""
    params = [request.params for request in requests]

    def column(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([getattr(each, name) for each in params], dtype=dtype)

    added = [
        (index, request.params, request.prompt, request.output)
        for index, request in enumerate(requests)
    ]
    update = BatchUpdate(len(requests), removed=[], added=added, moved=[])
    processors = LogitsProcessors(
        kind(CPU.config, CPU.device, False)
        for kind in (MinTokensLogitsProcessor, LogitBiasLogitsProcessor, MinPLogitsProcessor)
    )
    for processor in processors.all:
        processor.update_state(update)
    greedy = [each.temperature < 1e-5 for each in params]
    penalties = [
        (each.frequency_penalty, each.presence_penalty, each.repetition_penalty) for each in params
    ]
    no_penalties = all(each == (0, 0, 1) for each in penalties)
    bad_words = {
        index: each.bad_words_token_ids
        for index, each in enumerate(params)
        if each.bad_words_token_ids
    }
    longest = max(len(request.prompt) for request in requests)
    prompts = [
        request.prompt + [vocabulary] * (longest - len(request.prompt)) for request in requests
    ]
    allowed = torch.zeros(len(requests), vocabulary, dtype=torch.bool)
    for index, each in enumerate(params):
        if each.allowed_token_ids is not None:
            allowed[index] = True
            allowed[index, each.allowed_token_ids] = False
    top_k = [each.top_k if each.top_k > 0 else vocabulary for each in params]
    return SamplingMetadata(
        temperature=None if all(greedy) else column("temperature"),
        all_greedy=all(greedy),
        all_random=not any(greedy),
        top_p=None if all(each.top_p == 1 for each in params) else column("top_p"),
        top_k=None if set(top_k) == {vocabulary} else torch.tensor(top_k, dtype=torch.int32),
        generators={
            index: request.generator
            for index, request in enumerate(requests)
            if request.generator is not None
        },
        max_num_logprobs=None,
        no_penalties=no_penalties,
        prompt_token_ids=None if no_penalties else torch.tensor(prompts, dtype=torch.int64),
        frequency_penalties=column("frequency_penalty"),
        presence_penalties=column("presence_penalty"),
        repetition_penalties=column("repetition_penalty"),
        output_token_ids=[request.output for request in requests if bad_words or not no_penalties],
        allowed_token_ids_mask=allowed if allowed.any() else None,
        bad_words_token_ids=bad_words,
        logitsprocs=processors,
    )


class Scripted(torch.nn.Module):
    """The last stage of stock's sampler with the draw replaced: keeps what was to be drawn from, says given tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []
        self.generators: dict[int, torch.Generator] = {}
        self.seen: torch.Tensor | None = None

    def forward(
        self,
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, None]:
        self.seen = apply_top_k_top_p(logits, k, p).clone()
        self.generators = dict(generators)
        return torch.tensor(self.tokens, dtype=torch.int64), None


@dataclass(frozen=True)
class Call:
    """One call of the sampler: what it was given, and its logits at two stages."""

    rows: torch.Tensor
    metadata: SamplingMetadata
    penalised: torch.Tensor
    """After penalties and the processors that change what greedy decoding takes."""
    final: torch.Tensor | None
    """After temperature, min_p, top_k and top_p; None where all requests are greedy."""


class ScriptedSampler(Sampler):
    """Stock's sampler in every stage but the draw, which follows a script; it remembers its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.topk_topp_sampler = self.stage = Scripted()
        self.calls: list[Call] = []
        self.next_tokens: Callable[[Call], list[int]] = lambda call: [0] * len(call.rows)

    def forward(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        assert len(self.calls) < MOST_CALLS, "the walk goes on below its tree"
        self.calls.append(Call(logits.clone(), sampling_metadata, logits, None))
        return super().forward(logits, sampling_metadata)

    def sample(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> Any:
        call = Call(self.calls[-1].rows, sampling_metadata, logits.clone(), None)
        self.stage.tokens = self.next_tokens(call)
        self.stage.seen = None
        result = super().sample(logits, sampling_metadata)
        self.calls[-1] = Call(call.rows, sampling_metadata, call.penalised, self.stage.seen)
        return result


VOCABULARY = 5


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    """Any mixture of what shapes the distribution of the next token."""
    token = st.integers(0, VOCABULARY - 1)
    some_tokens = st.lists(token, min_size=1, max_size=VOCABULARY, unique=True)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.6, 1.0, 1.7])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.5])),
        top_k=draw(st.sampled_from([0, 1, 2, 4])),
        min_p=draw(st.sampled_from([0.0, 0.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.7, -0.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.4])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        min_tokens=draw(st.integers(0, 4)),
        max_tokens=16,
        stop_token_ids=draw(st.lists(token, max_size=2, unique=True)),
        logit_bias=draw(st.none() | st.dictionaries(token, st.floats(-3, 3), min_size=1)),
        allowed_token_ids=draw(st.none() | some_tokens),
        detokenize=False,
    )
    words = st.lists(st.lists(token, min_size=1, max_size=3), min_size=1, max_size=3)
    params._bad_words_token_ids = draw(st.none() | words)
    return params


@st.composite
def batches(draw: st.DrawFn) -> list[Request]:
    tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=4)
    return [
        Request(
            params=draw(sampling_params()),
            prompt=[*draw(tokens), 1],
            output=draw(tokens),
            generator=torch.Generator().manual_seed(index) if draw(st.booleans()) else None,
        )
        for index in range(draw(st.integers(1, 4)))
    ]


@dataclass
class Pass:
    """The rows of a verification pass: requests lie one after the other, each root before its nodes."""

    trees: list[TokenTree | None]
    logits: torch.Tensor
    roots: list[int]

    @classmethod
    def random(cls, trees: list[TokenTree | None], seed: int) -> Pass:
        sizes = [1 + (0 if tree is None else len(tree)) for tree in trees]
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(sum(sizes), VOCABULARY, generator=generator) * 2
        return cls(trees, logits, [sum(sizes[:index]) for index in range(len(sizes))])

    def verify(self, sampler: Sampler, metadata: SamplingMetadata) -> Verified:
        return verify(sampler, self.logits, metadata, self.trees, self.roots)

    def row_after(self, request: int, path: Sequence[int]) -> int | None:
        """The row that holds the distribution after a drafted path, found without the walk."""
        tree, node = self.trees[request], ROOT
        for token in path:
            edges = [] if tree is None else list(zip(tree.parents, tree.tokens, strict=True))
            found = [index for index, edge in enumerate(edges) if edge == (node, token)]
            if not found:
                return None
            node = found[0]
        return self.roots[request] + 1 + node


def walked(step: Pass, verified: Verified) -> list[list[tuple[int, Text]]]:
    """For each call of the sampler: (request, its path so far) in the order of the rows."""
    tokens = verified.walk.tokens
    depths = max(map(len, tokens))
    return [
        [(request, tuple(t[:depth])) for request, t in enumerate(tokens) if len(t) > depth]
        for depth in range(depths)
    ]


def paths_of_script(script: Sequence[int], step: Pass) -> Callable[[Call], list[int]]:
    """Says the script's tokens one after the other, a fresh one for every row of every call."""
    tokens = itertools.cycle(script)
    return lambda call: [next(tokens) for _ in range(len(call.rows))]


@examples(120)
@given(st.data(), batches(), st.integers(0, 2**16))
def test_the_sampler_sees_plain_decoding_on_every_path(
    data: st.DataObject, requests: list[Request], seed: int
) -> None:
    """Row by row and bit by bit, the logits from which a token is drawn are those of decoding the same tokens alone.

    Alone: a batch of one, with the path as its output, and processors made for it. So rows, penalties, bad words,
    allowed tokens, biases, min_tokens, min_p, temperature, top_k and top_p are all those of the right request, exact
    on the path. The generators are the requests' own.
    """
    drafts = trees(VOCABULARY, max_nodes=12) | st.just(full_tree(VOCABULARY, 2)) | st.none()
    step = Pass.random([data.draw(drafts) for _ in requests], seed)
    script = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12))
    metadata = metadata_of(requests, VOCABULARY)
    outputs_before = [list(request.output) for request in requests]
    sampler = ScriptedSampler()
    sampler.next_tokens = paths_of_script(script, step)

    verified = step.verify(sampler, metadata)

    assert [request.output for request in requests] == outputs_before
    visited = walked(step, verified)
    assert len(visited) == len(sampler.calls)
    for call, entries in zip(sampler.calls, visited, strict=True):
        assert len(entries) == len(call.rows)
        for place, (index, path) in enumerate(entries):
            row = step.row_after(index, path)
            assert row is not None
            request = requests[index]
            alone = ScriptedSampler()
            decoding = Request(request.params, request.prompt, [*request.output, *path])
            expected = metadata_of([decoding], VOCABULARY)
            alone(step.logits[row : row + 1].clone(), expected)
            assert torch.equal(call.rows[place], step.logits[row])
            assert torch.equal(call.penalised[place], alone.calls[0].penalised[0])
            final = alone.calls[0].final
            if final is not None:
                assert call.final is not None
                assert torch.equal(call.final[place], final[0])
            assert call.metadata.generators.get(place) is request.generator
        assert len(call.metadata.generators) == sum(
            requests[index].generator is not None for index, _ in entries
        )


@examples(60)
@given(st.data(), batches(), st.integers(0, 2**16))
def test_the_metadata_is_that_of_the_right_requests(
    data: st.DataObject, requests: list[Request], seed: int
) -> None:
    """Field by field, what the sampler is given at each depth is what a batch of the walking requests would have."""
    step = Pass.random([data.draw(trees(VOCABULARY) | st.none()) for _ in requests], seed)
    script = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8))
    metadata = metadata_of(requests, VOCABULARY)
    metadata.spec_token_ids = [[0]] * len(requests)
    sampler = ScriptedSampler()
    sampler.next_tokens = paths_of_script(script, step)
    verified = step.verify(sampler, metadata)
    assert sampler.calls[0].metadata is metadata
    plain = {"temperature", "top_p", "top_k", "allowed_token_ids_mask", "prompt_token_ids"}
    plain |= {"frequency_penalties", "presence_penalties", "repetition_penalties"}
    for call, entries in zip(sampler.calls[1:], walked(step, verified)[1:], strict=True):
        chosen = [index for index, _ in entries]
        here = call.metadata
        for name in plain:
            whole, part = getattr(metadata, name), getattr(here, name)
            assert (whole is None) == (part is None), name
            assert whole is None or torch.equal(part, whole[chosen]), name
        assert here.generators == {
            place: metadata.generators[index]
            for place, index in enumerate(chosen)
            if index in metadata.generators
        }
        assert here.bad_words_token_ids == {
            place: metadata.bad_words_token_ids[index]
            for place, index in enumerate(chosen)
            if index in metadata.bad_words_token_ids
        }
        if metadata.output_token_ids:
            assert here.output_token_ids == [
                [*requests[index].output, *path] for index, path in entries
            ]
        assert here.spec_token_ids is None
        assert here.thinking_budget_state_holder is None  # its requests have no trees
        same = {"all_greedy", "all_random", "max_num_logprobs", "no_penalties"}
        assert all(getattr(here, name) == getattr(metadata, name) for name in same)
        known = plain | same | {"generators", "bad_words_token_ids", "output_token_ids"}
        rest = {field.name for field in fields(SamplingMetadata)} - known
        assert rest == {
            "logitsprocs",
            "logprob_token_ids",
            "spec_token_ids",
            "thinking_budget_state_holder",
        }


class Marking:
    """In place of the sampler: given tokens, and logprobs that say which request and depth they are of."""

    def __init__(self, script: Sequence[int], marks: bool) -> None:
        self.script = itertools.cycle(script)
        self.marks = marks
        self.marked: list[torch.Tensor] = []

    def __call__(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        tokens = torch.tensor([[next(self.script)] for _ in logits], dtype=torch.int32)
        assert len(self.marked) < MOST_CALLS, "the walk goes on below its tree"
        self.marked.append(logits)
        tensors = LogprobsTensors(tokens.repeat(1, 3), logits[:, :3], logits[:, 0].long())
        return SamplerOutput(tokens, tensors if self.marks else None)


@examples(60)
@given(st.data(), batches(), st.booleans(), st.integers(0, 2**16))
def test_all_depths_as_one_output(
    data: st.DataObject, requests: list[Request], logprobs: bool, seed: int
) -> None:
    """Tokens and logprobs lie where stock's rejection sampler puts them: [requests, depths], -1 behind the end."""
    step = Pass.random([data.draw(trees(VOCABULARY) | st.none()) for _ in requests], seed)
    script = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8))
    sampler: Any = Marking(script, logprobs)
    verified = step.verify(sampler, metadata_of(requests, VOCABULARY))
    tokens = verified.walk.tokens
    depths = max(map(len, tokens))
    table = verified.output.sampled_token_ids.tolist()
    assert table == [text + [-1] * (depths - len(text)) for text in tokens]
    if not logprobs:
        assert verified.output.logprobs_tensors is None
        return
    found = verified.output.logprobs_tensors
    assert found is not None
    for index, text in enumerate(tokens):
        for depth, token in enumerate(text):
            row = step.row_after(index, text[:depth])
            assert row is not None
            place = index * depths + depth
            assert found.logprob_token_ids[place].tolist() == [token] * 3
            assert torch.equal(found.logprobs[place], step.logits[row, :3])
            assert found.selected_token_ranks[place] == step.logits[row, 0].long()


def test_logprobs_of_given_tokens_stop_their_own_request_at_the_root() -> None:
    """They have no form for several tokens a step; the other requests of the batch walk on."""
    requests = [Request(SamplingParams(temperature=1.0), [1], []) for _ in range(2)]
    step = Pass.random([full_tree(VOCABULARY, 2), full_tree(VOCABULARY, 2)], 0)
    metadata = metadata_of(requests, VOCABULARY)
    metadata.logprob_token_ids = {0: [1]}
    sampler: Any = Marking([2], True)
    verified = step.verify(sampler, metadata)
    assert verified.walk.tokens == [[2], [2, 2, 2]]
    assert [len(logits) for logits in sampler.marked] == [2, 1, 1]
    assert verified.output.sampled_token_ids.tolist() == [[2, -1, -1], [2, 2, 2]]


def outcomes(request: Request, table: Target, tree: TokenTree | None) -> Distribution:
    """What one ``verify`` of one request emits: every token at every draw, weighted by the logits it is drawn from."""
    found: defaultdict[Text, float] = defaultdict(float)
    step = Pass.random([tree], 0)
    for index in range(len(step.logits)):
        path = () if tree is None else tuple(tree.tokens[tree.path(index - 1)].tolist())
        step.logits[index] = torch.tensor(table.after(tuple(request.output) + path)).log()
    histories: list[Text] = [()]
    while histories:
        history = histories.pop()
        sampler = ScriptedSampler()
        script = iter(history)
        probability = 1.0

        def say(call: Call, script: Iterator[int] = script) -> list[int]:
            return [next(script, -1)]

        sampler.next_tokens = say
        verified = step.verify(sampler, metadata_of([request], VOCABULARY))
        for call, token in zip(sampler.calls, history, strict=False):
            assert call.final is not None
            probability *= float(call.final[0].double().softmax(0)[token])
        assume(not math.isnan(probability))  # options that forbid every token
        tokens = tuple(verified.walk.tokens[0])
        assert len(tokens) <= 1 + (0 if tree is None else tree.max_depth)
        if tokens == history:
            found[history] += probability
        elif probability > 0:
            assert tokens == (*history, -1)
            histories += [(*history, token) for token in range(VOCABULARY)]
    return dict(found)


@examples(30)
@given(st.data(), sampling_params(), st.integers(0, 2**16))
def test_verify_emits_what_plain_decoding_emits(
    data: st.DataObject, params: SamplingParams, seed: int
) -> None:
    """Through verify and stock's processing of the logits, penalties on the path and all: total variation < 1e-12."""
    params.temperature = max(params.temperature, 0.5)
    table = Target(VOCABULARY, seed)
    tree = data.draw(trees(VOCABULARY, max_nodes=6) | st.just(full_tree(VOCABULARY, 1)))

    def texts(trees_of_steps: Callable[[Text], TokenTree | None], length: int) -> Distribution:
        finished: defaultdict[Text, float] = defaultdict(float)
        unfinished: dict[Text, float] = {(): 1.0}
        while unfinished:
            text, probability = unfinished.popitem()
            request = Request(params, [1, 2], list(text))
            for tokens, weight in outcomes(request, table, trees_of_steps(text)).items():
                longer = text + tokens
                if len(longer) >= length:
                    finished[longer[:length]] += probability * weight
                elif weight > 0:
                    assert longer not in unfinished
                    unfinished[longer] = probability * weight
        return dict(finished)

    plain = texts(lambda text: None, 2)
    assert sum(plain.values()) == pytest.approx(1, abs=PRECISION)
    assert total_variation(texts(once(tree), 2), plain) < PRECISION


def decode(
    requests: list[Request], table: Target, policy: Policy, length: int
) -> tuple[list[list[int]], int]:
    """Decode with stock's own sampler, draws included, and these trees; the texts and the number of steps."""
    sampler = Sampler()
    calls = itertools.count()

    def count(*_: object) -> None:
        assert next(calls) < MOST_CALLS * length, "the walk goes on below its tree"

    sampler.register_forward_pre_hook(count)
    steps_taken = 0
    while min(len(request.output) for request in requests) < length:
        texts = [tuple(request.output) for request in requests]
        drafts = [policy(text) for text in texts]
        step = Pass.random(drafts, 0)
        for index, (tree, text) in enumerate(zip(drafts, texts, strict=True)):
            for node in range(ROOT, 0 if tree is None else len(tree)):
                path = () if tree is None else tuple(tree.tokens[tree.path(node)].tolist())
                step.logits[step.roots[index] + 1 + node] = torch.tensor(
                    table.after(text + path)
                ).log()
        verified = step.verify(sampler, metadata_of(requests, VOCABULARY))
        for request, tokens in zip(requests, verified.walk.tokens, strict=True):
            request.output += tokens
        steps_taken += 1
    return [request.output[:length] for request in requests], steps_taken


@examples(25)
@given(st.data(), st.integers(0, 2**16))
def test_greedy_and_seeded_texts_are_those_of_plain_decoding(
    data: st.DataObject, seed: int
) -> None:
    """With stock's sampler as it is: greedy and seeded requests, mixed or not, emit the very tokens, in fewer steps."""
    table = Target(VOCABULARY, seed)
    kind = data.draw(st.sampled_from(["greedy", "seeded", "mixed"]))
    all_params = [data.draw(sampling_params()) for _ in range(3)]
    for index, params in enumerate(all_params):
        greedy = kind == "greedy" or (kind == "mixed" and index == 1)
        params.temperature = 0.0 if greedy else max(params.temperature, 0.5)

    def fresh() -> list[Request]:
        return [
            Request(params, [1, 3], [], torch.Generator().manual_seed(index))
            for index, params in enumerate(all_params)
        ]

    choice = data.draw(st.lists(trees(VOCABULARY), min_size=1, max_size=4))
    plain, plain_steps = decode(fresh(), table, lambda text: None, 8)
    assert plain_steps == 8
    some, _ = decode(fresh(), table, lambda text: choice[sum(text) % len(choice)], 8)
    assert some == plain
    full, full_steps = decode(fresh(), table, lambda text: full_tree(VOCABULARY, 2), 8)
    assert full == plain
    assert full_steps == 3
