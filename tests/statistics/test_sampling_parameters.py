# SPDX-License-Identifier: Apache-2.0
"""Sampled texts in the engine against exact probabilities: sampling parameters, each under hostile trees.

The target's distribution is enumerated with transformers' logits and a processing of our own in numpy. The trees know
it, and use that for the worst: tokens that are never sampled, equal siblings of the likeliest, the whole vocabulary.
They never see the target's random numbers, so every text must keep its probability.

False alarms: SUITE_FALSE_ALARM_RATE for all chi-square tests of this module together (Bonferroni), were the seeds not
fixed. They are, so each passes always or never on a given machine.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from tests.support.engines import counters_of, engine, planted_options
from tests.support.models import random_model
from vllm_hidden_transfer.bench.engine_process import SpecCounters
from vllm_hidden_transfer.drafting.source import DraftBatch, DraftSource
from vllm_hidden_transfer.tree import ROOT, TokenTree

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("sampling_parameters")]

VOCABULARY = 8
LENGTH = 3
PROMPT_LENGTH = 6
BUDGET = 12
SAMPLES = 4_000
SAMPLES_OF_KIND = 2_500
SAMPLES_BESIDE_OTHERS = 1_000
TOGETHER = 10
"""Texts of one request (``n``): few, so that requests of different parameters are neighbours in a batch."""
VARIANTS = 6
"""Trees of a kind after each text; a tree of its own every time would take longer to build than to verify."""
SUITE_FALSE_ALARM_RATE = 1e-3

Text = tuple[int, ...]
Row = NDArray[np.float64]


def processed(
    logits: Row,
    prompt: Text,
    output: Text,
    *,
    temperature: float = 1.0,
    top_k: int = VOCABULARY,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> Row:
    """The probabilities of the next token as vLLM documents its sampling parameters."""
    counts = np.bincount(output, minlength=VOCABULARY) if output else np.zeros(VOCABULARY)
    seen = np.isin(np.arange(VOCABULARY), [*prompt, *output])
    scaled = np.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    penalised = np.where(seen, scaled, logits)
    penalised = penalised - frequency_penalty * counts - presence_penalty * (counts > 0)
    found = np.exp((penalised - penalised.max()) / temperature)
    found[found < min_p * found.max()] = 0
    order = np.argsort(-found)
    found[order[top_k:]] = 0
    found /= found.sum()
    before = np.cumsum(found[order]) - found[order]
    found[order[before >= top_p]] = 0
    return found / found.sum()


@dataclass(frozen=True)
class Exact:
    """The target's distribution after one prompt, under one setting."""

    rows: Mapping[Text, Row]
    """Of the next token, after every text shorter than LENGTH."""

    def texts(self) -> dict[Text, float]:
        """The probability of every text of LENGTH tokens."""
        return {
            text: float(np.prod([self.rows[text[:size]][text[size]] for size in range(LENGTH)]))
            for text in itertools.product(range(VOCABULARY), repeat=LENGTH)
        }

    def likeliest(self, text: Text, rank: int = 0) -> int:
        """The likeliest next token, or the one of another rank; anything behind the end of the texts."""
        row = self.rows.get(text)
        return rank if row is None else int(np.argsort(-row)[rank])

    def never(self, text: Text) -> list[int]:
        """Next tokens that cannot be sampled; the least likely two where all can."""
        row = self.rows.get(text)
        if row is None:
            return [0]
        return np.flatnonzero(row == 0).tolist() or np.argsort(row)[:2].tolist()


class Builder:
    """A tree that grows node by node."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._parents: list[int] = []

    def add(self, token: int, parent: int = ROOT) -> int:
        self._tokens.append(token)
        self._parents.append(parent)
        return len(self._tokens) - 1

    def filled(self, rng: np.random.Generator, choice: Sequence[int]) -> TokenTree:
        """The tree with BUDGET nodes: what is missing are some of these tokens, anywhere."""
        while len(self._tokens) < BUDGET:
            self.add(int(rng.choice(choice)), int(rng.integers(ROOT, len(self._tokens))))
        return TokenTree(np.array(self._tokens), np.array(self._parents))


def equal_siblings(exact: Exact, text: Text, rng: np.random.Generator) -> TokenTree:
    """Nothing but the two likeliest tokens, so most nodes have twins, with and without children."""
    best = [exact.likeliest(text), exact.likeliest(text, 1)]
    tree = Builder()
    for _ in range(3):  # the first of the twins has no children of its own, the last has two
        last = [tree.add(token) for token in best]
    for parent, child in itertools.product(last, best):
        tree.add(child, parent)
    return tree.filled(rng, best)


def never_sampled(exact: Exact, text: Text, rng: np.random.Generator) -> TokenTree:
    """Only tokens that cannot come next: all wrong."""
    return Builder().filled(rng, exact.never(text))


def half_wrong(exact: Exact, text: Text, rng: np.random.Generator) -> TokenTree:
    """Tokens that cannot come next before, beside and below those that are likeliest."""
    tree = Builder()
    wrong = exact.never(text)
    for token in wrong[:4]:
        tree.add(token)
    best = exact.likeliest(text)
    good = tree.add(best)
    for token in exact.never((*text, best))[:4]:
        tree.add(token, good)
    tree.add(exact.likeliest((*text, best)), good)
    return tree.filled(rng, [*wrong, best])


def full_width(exact: Exact, text: Text, rng: np.random.Generator) -> TokenTree:
    """Every token of the vocabulary, and some of them below the likeliest."""
    tree = Builder()
    children = {int(token): tree.add(int(token)) for token in rng.permutation(VOCABULARY)}
    for token in rng.permutation(VOCABULARY)[: BUDGET - VOCABULARY]:
        tree.add(int(token), children[exact.likeliest(text)])
    return tree.filled(rng, [0])


def deep_chain(exact: Exact, text: Text, rng: np.random.Generator) -> TokenTree:
    """The likeliest continuation, and on far behind the end of the text."""
    tree = Builder()
    node = ROOT
    for _ in range(BUDGET):
        token = exact.likeliest(text)
        node, text = tree.add(token, node), (*text, token)
    return tree.filled(rng, [0])


Trees = Callable[[Exact, Text, np.random.Generator], TokenTree]
KINDS: tuple[Trees, ...] = (equal_siblings, never_sampled, half_wrong, full_width, deep_chain)


class HostileSource(DraftSource):
    """Trees of these kinds in turn by chance, for prompts whose distributions it was told."""

    known: ClassVar[dict[Text, Exact]] = {}
    kinds: ClassVar[Sequence[Trees]] = KINDS
    built: ClassVar[dict[tuple[Text, Trees, int], TokenTree]] = {}
    rng: ClassVar[np.random.Generator] = np.random.default_rng(0)

    def __init__(self, runner: object) -> None: ...

    def describe(self) -> str:
        return "hostile drafts (a measurement)"

    def on_target_loaded(self, model: object) -> None:
        """It needs nothing of the target."""

    def propose(self, batch: DraftBatch) -> list[TokenTree]:
        return [self._tree(tuple(tokens.tolist())) for tokens in batch.token_ids]

    def _tree(self, tokens: Text) -> TokenTree:
        kind = self.kinds[int(self.rng.integers(len(self.kinds)))]
        variant = int(self.rng.integers(VARIANTS))
        key = (tokens, kind, variant)
        if key not in self.built:
            exact, text = self.known[tokens[:PROMPT_LENGTH]], tokens[PROMPT_LENGTH:]
            self.built[key] = kind(exact, text, np.random.default_rng([variant, *text]))
        return self.built[key]


@dataclass(frozen=True)
class Setting:
    """Sampling parameters, with a prompt of their own."""

    name: str
    prompt: Text
    sampling: Mapping[str, float] = field(default_factory=dict)


PARAMETERS: dict[str, Mapping[str, float]] = {
    "temperature 0.5": {"temperature": 0.5},
    "temperature 1.3": {"temperature": 1.3},
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 3},
    "min_p": {"min_p": 0.1},
    "repetition": {"repetition_penalty": 1.6},
    "presence": {"presence_penalty": 1.2},
    "frequency": {"frequency_penalty": 0.9},
    "all": {
        "temperature": 1.2,
        "top_k": 6,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.5,
    },
}
PROMPTS = np.random.default_rng(14).integers(3, VOCABULARY, (len(PARAMETERS), PROMPT_LENGTH))
SETTINGS = {
    name: Setting(name, tuple(prompt.tolist()), sampling)
    for (name, sampling), prompt in zip(PARAMETERS.items(), PROMPTS, strict=True)
}
ALL = SETTINGS["all"]
assert len({setting.prompt for setting in SETTINGS.values()}) == len(SETTINGS)
NUM_TESTS = len(SETTINGS) + len(KINDS) + 3 * len(SETTINGS)
"""Chi-square tests: every setting, every kind of tree, and every setting again in one batch, with these trees and, in
test_text_drafts.py, with drafts from the text at every step and where they pay."""


@torch.inference_mode()
def enumerate_all(target: Path) -> dict[str, Exact]:
    """The exact distribution of every setting."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    exact: dict[str, Exact] = {}
    for name, setting in SETTINGS.items():
        rows: dict[Text, Row] = {}
        for size in range(LENGTH):
            texts = list(itertools.product(range(VOCABULARY), repeat=size))
            ids = torch.tensor([[*setting.prompt, *text] for text in texts])
            logits = model(ids).logits[:, -1].double().numpy()
            for text, row in zip(texts, logits, strict=True):
                rows[text] = processed(row, setting.prompt, text, **setting.sampling)  # type: ignore[arg-type]
        exact[name] = Exact(rows)
    return exact


@dataclass
class Bench:
    """The engine, and what is known of its target."""

    llm: Any
    exact: Mapping[str, Exact]

    def sample(
        self, settings: Sequence[Setting], kinds: Sequence[Trees], seed: int, samples: int = SAMPLES
    ) -> tuple[list[Counter[Text]], SpecCounters]:
        """Texts of every setting, side by side, and what was drafted for them."""
        from vllm import SamplingParams

        torch.manual_seed(seed)
        HostileSource.rng = np.random.default_rng(seed)
        HostileSource.kinds = kinds
        before = counters_of(self.llm)
        requests = [setting for _ in range(samples // TOGETHER) for setting in settings]
        answers = self.llm.generate(
            [{"prompt_token_ids": list(setting.prompt)} for setting in requests],
            [
                SamplingParams(
                    n=TOGETHER,
                    max_tokens=LENGTH,
                    ignore_eos=True,
                    detokenize=False,
                    **setting.sampling,
                )
                for setting in requests
            ],
            use_tqdm=False,
        )
        texts: dict[str, Counter[Text]] = {setting.name: Counter() for setting in settings}
        for setting, answer in zip(requests, answers, strict=True):
            texts[setting.name].update(tuple(output.token_ids) for output in answer.outputs)
        return list(texts.values()), counters_of(self.llm) - before

    def assert_exact(self, setting: Setting, texts: Counter[Text]) -> None:
        """What was sampled is possible, and as frequent as it should be."""
        expected = self.exact[setting.name].texts()
        samples = sum(texts.values())
        assert sum(expected.values()) == pytest.approx(1)
        assert [text for text in texts if expected[text] == 0] == []
        possible = [text for text, probability in expected.items() if probability > 0]
        counts = np.array([texts[text] for text in possible], dtype=float)
        means = np.array([expected[text] for text in possible]) * samples
        rare = means < 5
        if rare.any():
            counts = np.append(counts[~rare], counts[rare].sum())
            means = np.append(means[~rare], means[rare].sum())
        assert len(counts) >= 10
        p_value = chisquare(counts, means * counts.sum() / means.sum()).pvalue
        print(f"{setting.name}: p = {p_value:.3g} on {len(counts)} cells")
        assert p_value > SUITE_FALSE_ALARM_RATE / NUM_TESTS


def tiny_model(folder: Path) -> Path:
    """So narrow that sampling takes longer than the model, with logits as wide apart as a larger one's."""
    return random_model(
        folder / "tiny",
        layers=2,
        vocabulary=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.24,
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    target = tiny_model(tmp_path_factory.mktemp("tiny"))
    exact = enumerate_all(target)
    HostileSource.known = {SETTINGS[name].prompt: found for name, found in exact.items()}
    source = f"{HostileSource.__module__}:{HostileSource.__name__}"
    options = {"max_num_seqs": 128, "max_model_len": 64}
    with engine(target, **options, **planted_options(BUDGET, source)) as llm:
        yield Bench(llm, exact)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_parameter(name: str, bench: Bench) -> None:
    """Trees of all kinds, drawn by chance for every request and step."""
    setting = SETTINGS[name]
    (texts,), counters = bench.sample([setting], KINDS, seed=1)
    assert counters.draft_tokens == BUDGET * counters.drafts > 0  # no tree was cut
    assert counters.accepted_tokens > 0.4 * counters.drafts
    bench.assert_exact(setting, texts)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_tree(kind: Trees, bench: Bench) -> None:
    """All parameters at once, with trees of one kind only."""
    (texts,), counters = bench.sample([ALL], [kind], 2, SAMPLES_OF_KIND)
    assert counters.draft_tokens == BUDGET * counters.drafts > 0
    if kind is never_sampled:
        assert counters.accepted_tokens == 0
    elif kind is full_width:
        assert counters.accepted_tokens >= counters.drafts
    else:
        assert counters.accepted_tokens > 0.2 * counters.drafts
    bench.assert_exact(ALL, texts)


def test_all_parameters_in_one_batch(bench: Bench) -> None:
    """Requests side by side, each with parameters of its own."""
    settings = list(SETTINGS.values())
    found, counters = bench.sample(settings, KINDS, 3, SAMPLES_BESIDE_OTHERS)
    assert counters.accepted_tokens > 0.4 * counters.drafts > 0
    for setting, texts in zip(settings, found, strict=True):
        bench.assert_exact(setting, texts)
