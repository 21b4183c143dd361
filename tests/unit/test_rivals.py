# SPDX-License-Identifier: Apache-2.0
"""Medusa heads and an EAGLE-style layer beside our maps: what they compute, that they learn, and the comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.rivals.__main__ import main
from benchmarks.rivals.compare import (
    Bench,
    ComparisonError,
    Origin,
    compare,
    drafts_of,
    held_out_kl,
)
from benchmarks.rivals.contestants import CONTESTANTS, Choice, Contestant, Sources
from benchmarks.rivals.eagle import EagleDrafter, EagleInTraining, EagleLayer, ridge_start
from benchmarks.rivals.medusa import MedusaHeads, MedusaInTraining
from benchmarks.rivals.report import write_report
from benchmarks.rivals.states import FinalStates
from tests.support.models import tiny_llama
from vllm_hidden_transfer.evaluation.drafts import JudgedAnswer
from vllm_hidden_transfer.evaluation.walks import Place
from vllm_hidden_transfer.offline.cache import Example, PrefixCache
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.training.trainer import DraftTrainer, TrainingConfig

pytestmark = pytest.mark.slow

LAYER, STEPS, SIZE, VOCABULARY = 2, 4, 32, 101
CONFIG = TrainingConfig(
    steps=20, sequences=3, roots=6, learning_rate=3e-3, warmup=2, log_every=1, negatives=-1
)


@pytest.fixture(scope="module")
def target() -> FrozenTarget:
    return FrozenTarget(tiny_llama(VOCABULARY), LAYER)


@pytest.fixture(scope="module")
def examples(target: FrozenTarget) -> list[Example]:
    """Answers that the tiny target gives itself, greedy and sampled in turns."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(10):
        temperature = 0.8 * (number % 2)
        prompt = rng.integers(0, VOCABULARY, size=4 + number).tolist()
        tokens = list(prompt)
        for _ in range(24 + number):
            logits = target.prefix(torch.tensor(tokens)).final[-1] @ target.head_weight.T
            noise = temperature * rng.gumbel(size=VOCABULARY)
            tokens.append(int((logits.double().numpy() + noise).argmax()))
        made.append(Example(str(number), "chat", temperature, prompt, tokens[len(prompt) :]))
    return made


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory, target: FrozenTarget, examples: list[Example]
) -> Sources:
    folder = tmp_path_factory.mktemp("sources")
    cache = PrefixCache(folder / "cache", target, "fingerprint")
    list(cache.fill(target, examples))
    states = FinalStates(folder / "states", target, cache, "fingerprint")
    assert len(list(states.fill(target, examples[:4]))) == 4
    # A later run does what is missing.
    states = FinalStates(folder / "states", target, cache, "fingerprint")
    assert len(list(states.fill(target, examples))) == len(examples) - 4
    return Sources(target, cache, states, STEPS)


def eagle_of(sources: Sources, seed: int = 1) -> EagleInTraining:
    """A layer whose fc is not the start's."""
    torch.manual_seed(seed)
    layer = EagleLayer(sources.target)
    with torch.no_grad():
        layer.feature_weight.add_(0.1 * torch.randn(SIZE, SIZE))
        layer.token_weight.copy_(0.5 * torch.randn(SIZE, SIZE))
        layer.bias.copy_(0.1 * torch.randn(SIZE))
    parts = (sources.target, sources.prefixes, sources.states, layer, STEPS)
    return EagleInTraining(*parts)


def test_final_states_are_the_targets(sources: Sources, examples: list[Example]) -> None:
    target = sources.target
    for example in examples[:3]:
        tokens = torch.tensor(example.tokens)
        with torch.no_grad():
            output = target.model.model(tokens[None], output_hidden_states=True)
        before, after = (sources.states.read(name, example) for name in ("before", "after"))
        torch.testing.assert_close(before, output.hidden_states[-2][0], rtol=1e-2, atol=1e-2)
        normed = target.model.model.norm(after)
        torch.testing.assert_close(normed, output.last_hidden_state[0], rtol=1e-2, atol=1e-2)


def test_new_medusa_heads_say_what_the_target_says_of_the_next_token(
    sources: Sources, examples: list[Example]
) -> None:
    target, example = sources.target, examples[0]
    heads = MedusaHeads(STEPS, SIZE)
    model = MedusaInTraining(target, sources.prefixes, sources.states, heads)
    roots = [5, 9, 17]
    rows = model.rows([example], [roots])
    logits = model.draft(rows).final[0] @ target.head_weight.T
    expected = target.model(torch.tensor([example.tokens])).logits[0, roots]
    for head in range(STEPS):
        torch.testing.assert_close(logits[:, head], expected, rtol=1e-2, atol=2e-2)
    # Head i is taught at root + i, where the target speaks of the token at root + 1 + i.
    after = target.model(torch.tensor([example.tokens])).logits[0]
    for root, ids in zip(roots, rows.teacher_ids[0], strict=True):
        assert ids[:, 0].tolist() == after[root + 1 : root + 1 + STEPS].argmax(-1).tolist()


def causal_pass(layer: EagleLayer, features: Tensor, embeddings: Tensor) -> Tensor:
    """The layer over a whole sequence [n, d] by transformers' own attention."""
    joined = layer.join(features, embeddings)[None]
    length = joined.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    config = layer.layer.self_attn.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    rotary = layer._rotary(joined, torch.arange(length)[None])
    output = layer.layer(joined, attention_mask=mask, position_embeddings=rotary)
    config._attn_implementation = before
    return (output[0] if isinstance(output, tuple) else output)[0]


@torch.no_grad()
def test_unrolled_steps_equal_causal_passes(sources: Sources, examples: list[Example]) -> None:
    model = eagle_of(sources)
    chosen, roots = [examples[1], examples[8]], [[5, 9, 12], [13, 20, 32]]
    rows = model.rows(chosen, roots)
    sequences = model.layer.read(rows.features, rows.embeddings)
    predicted = model.layer.unroll(sequences, rows.root_features, rows.roots, rows.path)
    for row, example in enumerate(chosen):
        features = sources.states.read("after", example)
        embeddings = sources.target.embed(torch.tensor(example.tokens)[1:])
        whole = causal_pass(model.layer, features[:-1], embeddings)
        for place, root in enumerate(roots[row]):
            found = predicted[row, place]
            torch.testing.assert_close(found[0], whole[root], rtol=1e-4, atol=1e-4)
            # Later steps: the same sequence with predicted features behind the root.
            seen = torch.cat([features[: root + 1], found[: STEPS - 1]])
            path = rows.path[row, place, 1:]
            again = causal_pass(model.layer, seen, torch.cat([embeddings[: root + 1], path]))
            torch.testing.assert_close(found, again[root:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_eagle_trees_follow_their_paths(sources: Sources, examples: list[Example]) -> None:
    model = eagle_of(sources)
    answers = [JudgedAnswer.of(example, 96) for example in examples]
    drafter = EagleDrafter(model, answers, [0.9, 1.0, 1.1, 1.2])
    places = [Place(2, 1), Place(0, 9), Place(5, 4)]
    chains = drafter.trees(places, STEPS, branching=1)
    for place, chain in zip(places, chains, strict=True):
        example, root = answers[place.answer].example, answers[place.answer].root(place.known)
        features = sources.states.read("after", example)[: root + 1]
        tokens = example.tokens[: root + 2]
        for drafted in chain.tokens.tolist():
            embeddings = sources.target.embed(torch.tensor(tokens[1:]))
            feature = causal_pass(model.layer, features, embeddings)[-1:]
            logits = model.final(feature) @ sources.target.head_weight.T
            assert drafted == int(logits.argmax())
            tokens.append(drafted)
            features = torch.cat([features, feature])
    for tree in drafter.trees(places, 16):
        assert len(tree) == 16


@pytest.mark.parametrize("name", ["medusa", "eagle"])
def test_loss_falls_in_20_steps(
    name: str, sources: Sources, examples: list[Example], tmp_path: Path
) -> None:
    contestant = CONTESTANTS[name]
    module = contestant.module(sources)
    choice = Choice(learning_rate=1e-2, start="copy", feature_loss=0.1)
    model = contestant.model(sources, module, choice)
    before = held_out_kl(model, examples, 0)
    config = CONFIG.model_copy(update={"learning_rate": choice.learning_rate})
    losses: list[float] = []
    trainer = DraftTrainer(model, examples, config, tmp_path)
    trainer.run(lambda entry: losses.append(entry["loss"]))
    assert len(losses) == 20
    # Each step's rows are others: the same rows before and after say whether it learnt.
    assert sum(held_out_kl(model, examples, 0)) < 0.95 * sum(before)
    assert all(parameter.grad is not None for parameter in module.parameters())
    # What was saved goes on at its step.
    again = contestant.model(sources, contestant.module(sources), choice)
    assert DraftTrainer(again, examples, config, tmp_path).step == 20


def test_the_closed_form_start_of_eagle_is_better_than_none(
    sources: Sources, examples: list[Example]
) -> None:
    target = sources.target
    copied, fitted = EagleLayer(target), EagleLayer(target)
    ridge_start(fitted, target, sources.states, examples, strength=1e-2)
    kl = [
        held_out_kl(
            EagleInTraining(target, sources.prefixes, sources.states, layer, STEPS), examples, 0
        )[0]
        for layer in (copied, fitted)
    ]
    assert kl[1] < kl[0]


def test_drafts_are_read_at_every_root(sources: Sources, examples: list[Example]) -> None:
    answer = JudgedAnswer.of(examples[0], 12)
    found = drafts_of(eagle_of(sources), answer)
    assert found.tokens.shape == (11, STEPS, 64)
    assert found.came[3].tolist() == examples[0].answer[4 : 4 + STEPS]


@pytest.fixture
def bench(tmp_path: Path, sources: Sources, examples: list[Example]) -> Bench:
    return Bench(
        sources=sources,
        train=examples[:4],
        held_out=examples[4:6],
        judged=examples[6:],
        config=CONFIG,
        folder=tmp_path / "work",
        minutes=0.005,
        sweep_minutes=0.005,
        origin=Origin(command="test", commit="0000000", machine="none", threads=1),
        console=Console(quiet=True),
    )


def test_the_comparison_from_sweep_to_page(bench: Bench, tmp_path: Path) -> None:
    for name in ("token", "medusa", "eagle"):
        compare(bench, CONTESTANTS[name])
    made = {path: path.stat().st_mtime_ns for path in bench.folder.rglob("*") if path.is_file()}
    compare(bench, CONTESTANTS["medusa"])  # there is nothing left to do
    assert made == {path: path.stat().st_mtime_ns for path in made}
    write_report(bench.folder, tmp_path / "page")
    record = json.loads((tmp_path / "page" / "rivals.json").read_text())
    assert list(record) == ["token", "medusa", "eagle"]
    page = (tmp_path / "page" / "rivals.md").read_text()
    absent = next(line for line in page.splitlines() if line.startswith("Not run to the end"))
    assert CONTESTANTS["chained"].title in absent
    assert CONTESTANTS["medusa"].title not in absent
    for name, found in record.items():
        assert CONTESTANTS[name].title in page
        trials, choice = found["sweep"], found["training"]["trial"]["plan"]["choice"]
        best = min(trials, key=lambda trial: trial["loss"])
        assert best["plan"]["choice"] == choice
        assert len(found["training"]["trial"]["kl"]) == STEPS
        for group in found["judgement"]["groups"]:
            lengths = [group["chain"]] + [each["found"] for each in group["budgets"]]
            assert [each["nodes"] for each in group["budgets"]] == [8, 16, 32]
            assert all(1 <= length["length"] <= STEPS + 1 for length in lengths)
    assert [len(found["sweep"]) for found in record.values()] == [3, 3, 6]
    with pytest.raises(ComparisonError, match="same minutes"):
        compare(Bench(**vars(bench) | {"sweep_minutes": 0.01}), CONTESTANTS["medusa"])


def test_drafting_costs(sources: Sources) -> None:
    def share(name: str) -> float:
        contestant: Contestant = CONTESTANTS[name]
        return contestant.share(sources, contestant.module(sources))

    assert share("medusa") < share("published") < share("token") < share("chained")
    assert share("medusa") < share("eagle")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--only", "hydra"], "--only hydra"),
        (["--settings", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_bad_input_is_one_sentence(extra: list[str], expected: str) -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--answers", "/nowhere.jsonl", *extra])
    assert result.exit_code == 1
    assert expected in result.output
    assert "Traceback" not in result.output
