# SPDX-License-Identifier: Apache-2.0
"""Training on a tiny random Llama: masking, cache, ridge, loss, exact resuming, calibration."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.models import tiny_llama
from vllm_hidden_transfer.checkpoint.config import Conditioning
from vllm_hidden_transfer.offline.cache import Example, PrefixCache, read_examples
from vllm_hidden_transfer.offline.target import FrozenTarget, SharedPrefixes
from vllm_hidden_transfer.training.bigram import BigramInTraining
from vllm_hidden_transfer.training.objective import (
    Candidates,
    Drafted,
    collect_rows,
    draft_loss,
    draw_roots,
)
from vllm_hidden_transfer.training.ridge import Moments, ridge_maps
from vllm_hidden_transfer.training.trainer import (
    STATE_FILE,
    DraftTrainer,
    InterruptedTraining,
    Trainer,
    TrainingConfig,
)

LAYER, STEPS, SIZE, VOCABULARY = 2, 3, 32, 101


@pytest.fixture(scope="module")
def target() -> FrozenTarget:
    return FrozenTarget(tiny_llama(VOCABULARY), LAYER)


@pytest.fixture(scope="module")
def examples(target: FrozenTarget) -> list[Example]:
    """Answers that the tiny target gives itself, greedily."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(6):
        prompt = rng.integers(0, VOCABULARY, size=4 + number).tolist()
        tokens = list(prompt)
        for _ in range(24 + number):
            tokens.append(
                int((target.prefix(torch.tensor(tokens)).final[-1] @ target.head_weight.T).argmax())
            )
        made.append(Example(str(number), "chat", 0.0, prompt, tokens[len(prompt) :]))
    return made


@pytest.fixture
def cache(tmp_path: Path, target: FrozenTarget, examples: list[Example]) -> PrefixCache:
    cache = PrefixCache(tmp_path / "cache", target, "fingerprint")
    assert len(list(cache.fill(target, examples))) == len(examples)
    return cache


def test_true_states_give_the_frozen_logits(target: FrozenTarget) -> None:
    """The masking is right if the upper layers cannot tell true states from pseudo states."""
    torch.manual_seed(1)
    sequences = [torch.randint(0, VOCABULARY, (n,)) for n in (30, 21)]
    prefixes = [target.prefix(tokens) for tokens in sequences]
    roots = torch.tensor([[0, 7, 26], [17, 2, 2]])
    length = max(len(tokens) for tokens in sequences)

    def padded(part: torch.Tensor) -> torch.Tensor:
        full = torch.full((part.shape[0], length, *part.shape[2:]), 7.0)  # padding must not matter
        full[:, : part.shape[1]] = part
        return full

    shared = SharedPrefixes(
        torch.stack([padded(p.keys) for p in prefixes]),
        torch.stack([padded(p.values) for p in prefixes]),
    )
    places = roots[:, :, None] + torch.arange(1, STEPS + 1)
    true = torch.stack([p.hidden[at] for p, at in zip(prefixes, places, strict=True)])
    expected = torch.stack([p.final[at] for p, at in zip(prefixes, places, strict=True)])
    final = target.run_rows(true, roots, shared)
    difference = (final - expected) @ target.head_weight.T
    assert difference.abs().max() < 1e-4
    # And a later row sees the earlier ones of its own root, no others.
    changed = true.clone()
    changed[0, 1, 0] += 1.0
    moved = (target.run_rows(changed, roots, shared) - final).abs().amax(-1) > 1e-6
    assert moved[0, 1].all()
    assert moved.sum() == STEPS


def test_cache_survives_a_kill_and_grows(
    tmp_path: Path, target: FrozenTarget, examples: list[Example]
) -> None:
    folder = tmp_path / "cache"
    first = PrefixCache(folder, target, "fingerprint")
    list(first.fill(target, examples[:3]))
    with (folder / "keys").open("ab") as file:
        file.write(b"half a sequence")
    with (folder / "index").open("a") as file:
        file.write("0123456789abcdef 1")  # no newline: not finished
    second = PrefixCache(folder, target, "fingerprint")
    assert [e.id for e in second.fill(target, examples)] == ["3", "4", "5"]
    for example in examples:
        prefix = target.prefix(torch.tensor(example.tokens))
        torch.testing.assert_close(
            second.read("hidden", example), prefix.hidden, rtol=1e-2, atol=1e-2
        )
        torch.testing.assert_close(
            second.read("keys", example), prefix.keys.transpose(0, 1), rtol=1e-2, atol=1e-2
        )
    with pytest.raises(ValueError, match="another target"):
        PrefixCache(folder, target, "another fingerprint")
    assert len(PrefixCache(folder, target, "fingerprint").digests) == len(examples)
    (folder / "about.json").unlink()
    assert not PrefixCache(folder, target, "another fingerprint").digests


def test_read_examples_leaves_out_unfinished_lines(tmp_path: Path) -> None:
    line = {"id": "a", "kind": "chat", "temperature": 0.0, "prompt": [1], "answer": [2] * 9}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"answer": [2]}) + "\n" + '{"id"')
    assert [e.id for e in read_examples(path)] == ["a"]


def test_draw_roots_stay_in_the_answer(examples: list[Example]) -> None:
    rng = np.random.default_rng(0)
    for example in examples:
        for count in (5, 100):
            roots = draw_roots(rng, example, count)
            assert len(roots) == count
            assert min(roots) >= len(example.prompt) - 1
            assert max(roots) <= len(example.tokens) - 3


def test_ridge_recovers_a_planted_map() -> None:
    torch.manual_seed(0)
    size, steps = 6, 2
    planted, token = torch.randn(steps, size, size), torch.randn(steps, size, size)
    # Features of very different scale, as in a residual stream.
    hidden = torch.randn(4000, size) * torch.tensor([100.0, 10.0, 1.0, 1.0, 0.1, 5.0])
    embedding = torch.randn(4000, size) * 0.05
    future = torch.einsum("kij,nj->nki", planted, hidden)
    future = future + torch.einsum("kij,nj->nki", token, embedding)
    moments = Moments.zeros(2 * size, steps * size)
    moments.add(torch.cat([hidden, embedding], dim=-1), future.flatten(1))
    solution = moments.solve(1e-9).unflatten(0, (steps, size))
    torch.testing.assert_close(solution[..., :size], planted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(solution[..., size:], token, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="no roots"):
        Moments.zeros(size, steps).solve(1e-3)


@pytest.mark.parametrize("conditioning", ["none", "token", "chained"])
def test_ridge_maps_are_least_squares(
    target: FrozenTarget, cache: PrefixCache, examples: list[Example], conditioning: Conditioning
) -> None:
    maps = ridge_maps(cache, target, examples, STEPS, conditioning, strength=1e-6)
    inputs, outputs = [], []
    for example in examples:
        states = cache.read("hidden", example)
        tokens = torch.tensor(example.tokens)
        roots = torch.arange(len(example.prompt) - 1, len(tokens) - STEPS)
        token = {"none": None, "token": 1, "chained": STEPS}[conditioning]
        seen = [states[roots]] + ([target.embed(tokens[roots + token])] if token else [])
        inputs.append(torch.cat(seen, dim=-1))
        outputs.append(states[roots + STEPS])
    x, y = torch.cat(inputs).double(), torch.cat(outputs).double()
    best = torch.linalg.lstsq(x, y, driver="gelsd").solution
    parts = [maps.weight[-1]] + ([] if maps.token_weight is None else [maps.token_weight[-1]])
    found = x @ torch.cat(parts, dim=-1).detach().double().T
    least = (x @ best - y).square().mean()
    assert (found - y).square().mean() < 1.05 * least + 1e-4 * y.square().mean()


def test_loss_and_gradient_equal_plain_kl(
    target: FrozenTarget, cache: PrefixCache, examples: list[Example]
) -> None:
    rows = collect_rows(cache, target, examples[:2], [[8, 20], [9, 26]], STEPS)
    torch.manual_seed(0)
    pseudo = torch.randn(2, 2, STEPS, SIZE, requires_grad=True)
    weights = torch.tensor([1.0, 0.8, 0.64])
    drafted = Drafted(target.run_rows(pseudo, rows.roots, rows.prefixes))
    loss = draft_loss(target, drafted, rows, weights)
    loss.total.backward()
    gradient = pseudo.grad
    pseudo.grad = None
    logits = target.run_rows(pseudo, rows.roots, rows.prefixes) @ target.head_weight.T
    log_student = logits.log_softmax(-1).gather(-1, rows.teacher_ids)
    teacher = rows.teacher_probs
    kl = (teacher * (teacher.clamp_min(1e-12).log() - log_student)).sum(-1)
    used = weights * rows.valid
    expected = (kl * used).sum() / used.sum()
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradient, pseudo.grad, rtol=1e-3, atol=1e-6)


def test_sampled_vocabulary_keeps_the_core(target: FrozenTarget) -> None:
    core = torch.tensor([3, 5, 90])
    sample = Candidates.sample(target.head_weight, core, 20, np.random.default_rng(0))
    assert len(sample.head) == 23
    assert (sample.places[core] == torch.arange(3)).all()
    assert (sample.places >= 0).sum() == 23
    rest = VOCABULARY - 3
    assert sample.bias[3:].exp().sum() == pytest.approx(rest)


def make_trainer(
    target: FrozenTarget,
    cache: PrefixCache,
    examples: list[Example],
    folder: Path,
    steps: int,
) -> Trainer:
    maps = ridge_maps(cache, target, examples, STEPS, "token", strength=1e-1)
    config = TrainingConfig(
        steps=steps, sequences=3, roots=4, learning_rate=3e-3, warmup=2, log_every=5, negatives=16
    )
    return Trainer(target, cache, examples, maps, config, folder)


@pytest.mark.slow
def test_loss_falls(
    tmp_path: Path, target: FrozenTarget, cache: PrefixCache, examples: list[Example]
) -> None:
    trainer = make_trainer(target, cache, examples, tmp_path / "run", 20)
    with torch.no_grad():  # the ridge start is too good on a target that repeats itself
        trainer.maps.weight.mul_(0.1)
    trainer.run()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [5, 10, 15, 20]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]


@pytest.mark.slow
def test_resuming_is_exact(
    tmp_path: Path, target: FrozenTarget, cache: PrefixCache, examples: list[Example]
) -> None:
    whole = make_trainer(target, cache, examples, tmp_path / "whole", 8)
    whole.run()
    part = make_trainer(target, cache, examples, tmp_path / "part", 8)
    for _ in range(3):
        part.train_step()
    part.save_state()
    again = make_trainer(target, cache, examples, tmp_path / "part", 8)
    assert again.step == 3
    again.run()
    for one, other in zip(whole.maps.parameters(), again.maps.parameters(), strict=True):
        assert torch.equal(one, other)


def bigram_trainer(
    target: FrozenTarget, cache: PrefixCache, examples: list[Example], folder: Path
) -> tuple[BigramInTraining, DraftTrainer]:
    maps = ridge_maps(cache, target, examples, STEPS, "token")
    model = BigramInTraining(target, cache, maps, rank=8, seed=1)
    config = TrainingConfig(
        steps=30, sequences=4, roots=6, learning_rate=4e-3, warmup=2, negatives=-1, log_every=1
    )
    return model, DraftTrainer(model, examples, config, folder)


@pytest.mark.slow
def test_bigrams_learn_what_follows_and_leave_the_maps_alone(
    tmp_path: Path, target: FrozenTarget, cache: PrefixCache, examples: list[Example]
) -> None:
    model, trainer = bigram_trainer(target, cache, examples, tmp_path / "whole")
    before = model.identity
    log: list[dict[str, Any]] = []
    trainer.run(log.append)
    first, last = (np.mean([entry["kl"] for entry in part], axis=0) for part in (log[:5], log[-5:]))
    assert last[0] == pytest.approx(first[0], rel=0.2)  # depth 1 is not re-weighted
    assert (last[1:] < 0.95 * first[1:]).all()
    assert model.identity == before
    again_model, again = bigram_trainer(target, cache, examples, tmp_path / "part")
    for _ in range(7):
        again.train_step()
    again.save_state()
    again_model, again = bigram_trainer(target, cache, examples, tmp_path / "part")
    assert again.step == 7
    again.run()
    assert torch.equal(model.bigram.up, again_model.bigram.up)
    assert torch.equal(model.bigram.down, again_model.bigram.down)


@pytest.mark.slow
def test_sigterm_saves_and_stops(
    tmp_path: Path, target: FrozenTarget, cache: PrefixCache, examples: list[Example]
) -> None:
    trainer = make_trainer(target, cache, examples, tmp_path / "run", 50)

    def kill(entry: dict[str, object]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedTraining, match="step 5"):
        trainer.run(kill)
    assert (tmp_path / "run" / STATE_FILE).is_file()
    assert make_trainer(target, cache, examples, tmp_path / "run", 50).step == 5


def test_state_of_other_settings_is_refused(
    tmp_path: Path, target: FrozenTarget, cache: PrefixCache, examples: list[Example]
) -> None:
    make_trainer(target, cache, examples, tmp_path / "run", 8).save_state()
    with pytest.raises(ValueError, match="other settings"):
        make_trainer(target, cache, examples, tmp_path / "run", 9)
