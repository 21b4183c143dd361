# SPDX-License-Identifier: Apache-2.0
"""The acceptance study: walks, calibration, chained trees, and the commands `eval` and `tune`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Emu3Config,
    Emu3ForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner, Result

from tests.support.models import tiny_llama
from vllm_hidden_transfer.checkpoint.config import (
    Calibration,
    Conditioning,
    SpeculatorsConfig,
    Target,
    TransferConfig,
    Tree,
    Verifier,
)
from vllm_hidden_transfer.checkpoint.fingerprint import fingerprint_target
from vllm_hidden_transfer.checkpoint.maps import TransferMaps, load_checkpoint, save_checkpoint
from vllm_hidden_transfer.checkpoint.vocabulary import VOCABULARY_FILE, load_vocabulary
from vllm_hidden_transfer.cli import app
from vllm_hidden_transfer.drafting.lookup import SHARES
from vllm_hidden_transfer.drafting.vocabulary import DraftVocabulary, most_used
from vllm_hidden_transfer.evaluation.calibration import (
    bin_probabilities,
    calibration_error,
    fit_temperatures,
    negative_log_likelihood,
    reliability,
)
from vllm_hidden_transfer.evaluation.chained import ChainedDrafter
from vllm_hidden_transfer.evaluation.drafts import (
    TEXT_CONTEXT,
    Drafts,
    JudgedAnswer,
    draft,
    drafts_from_states,
)
from vllm_hidden_transfer.evaluation.preparation import Prepared, spread_by_group
from vllm_hidden_transfer.evaluation.study import (
    Judged,
    draft_with_maps,
    judge,
    judged_answers,
    maps_drafter,
    measured,
)
from vllm_hidden_transfer.evaluation.study_result import Study
from vllm_hidden_transfer.evaluation.tuning import StepCosts, tune
from vllm_hidden_transfer.evaluation.walks import OnePassDrafter, Place, Walk, walk
from vllm_hidden_transfer.offline.cache import Example, PrefixCache
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.tree import ROOT, TokenTree

LAYER, STEPS, SIZE, VOCABULARY = 2, 3, 32, 101
SILENT = Progress(disable=True)
runner = CliRunner()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(VOCABULARY)


@pytest.fixture(scope="module")
def target(model: LlamaForCausalLM) -> FrozenTarget:
    return FrozenTarget(model, LAYER)


@pytest.fixture(scope="module")
def examples(target: FrozenTarget) -> list[Example]:
    """Answers that the tiny target gives itself: greedy ones, sampled ones, and text that is random."""
    rng = np.random.default_rng(0)
    made = []
    for number, temperature in enumerate((0.0, 0.0, 0.0, 0.8, 0.8, None, None)):
        prompt = rng.integers(0, VOCABULARY, size=4 + number).tolist()
        tokens = list(prompt)
        for _ in range(24 + number):
            logits = (target.prefix(torch.tensor(tokens)).final[-1] @ target.head_weight.T).double()
            noise = 0.0 if temperature is None else temperature * rng.gumbel(size=VOCABULARY)
            best = int((logits.numpy() + noise).argmax())
            tokens.append(int(rng.integers(VOCABULARY)) if temperature is None else best)
        kind = ("chat", "code")[number % 2]
        made.append(Example(str(number), kind, temperature, prompt, tokens[len(prompt) :]))
    return made


@pytest.fixture(scope="module")
def cache(
    tmp_path_factory: pytest.TempPathFactory, target: FrozenTarget, examples: list[Example]
) -> PrefixCache:
    cache = PrefixCache(tmp_path_factory.mktemp("cache"), target, "fingerprint")
    list(cache.fill(target, examples))
    return cache


def random_maps(conditioning: Conditioning, scale: float = 0.3) -> TransferMaps:
    """Maps that keep the state and add noise, so that drafts differ and are not hopeless."""
    torch.manual_seed(3)
    maps = TransferMaps(STEPS, SIZE, conditioning).requires_grad_(False)
    maps.weight.copy_(torch.eye(SIZE) + scale * torch.randn(STEPS, SIZE, SIZE) / SIZE**0.5)
    if maps.token_weight is not None:
        maps.token_weight.copy_(torch.randn(STEPS, SIZE, SIZE))
    return maps


def as_answer(tokens: Sequence[int], temperature: float | None = 0.0) -> JudgedAnswer:
    return JudgedAnswer.of(Example("a", "chat", temperature, [1, 2], list(tokens)), 96)


class Scripted:
    """Drafts the same tree wherever it is asked, and remembers where that was."""

    depths = 3

    def __init__(self, *paths: Sequence[int]) -> None:
        self.tree = TokenTree.from_paths(paths)
        self.asked: list[list[Place]] = []

    def trees(
        self, places: Sequence[Place], budget: int, branching: int | None = None
    ) -> list[TokenTree]:
        self.asked.append(list(places))
        return [self.tree] * len(places)


def test_a_walk_counts_passes_as_the_engine_does() -> None:
    drafter = Scripted([5, 6, 7], [5, 8])
    answers = [
        (5, 5, 6, 7, 9, 5, 8),  # 3 accepted and one more; then 2 accepted, which end the answer
        (5, 5, 6),  # the whole path would go on; the answer ends within it
        (5, 4, 4),  # nothing accepted: a token a pass
        (5,),  # ended by the prompt's pass
        (5, 5, 6, 7),  # the accepted path ends exactly where the answer does: no further pass
    ]
    walks = walk(answers, drafter, 4)
    assert [item.produced for item in walks] == [[4, 2], [2], [1, 1], [], [3]]
    assert [item.accepted for item in walks] == [[3, 2], [2], [0, 0], [], [3]]
    assert [item.decoded for item in walks] == [6, 2, 2, 0, 3]
    # Side by side: all answers that are still going take part in a round.
    assert drafter.asked == [
        [Place(0, 1), Place(1, 1), Place(2, 1), Place(4, 1)],
        [Place(0, 5), Place(2, 2)],
    ]


def test_a_walk_is_split_where_passes_start() -> None:
    first, rest = Walk([4, 2, 3], [3, 1, 2]).split(7)
    assert first == Walk([4, 2], [3, 1])  # they start with 1 and 5 known tokens
    assert rest == Walk([3], [2])
    assert Walk([], []).split(7) == (Walk([], []), Walk([], []))


def planted_drafts(answer: JudgedAnswer, wrong_depth: int | None = None) -> Drafts:
    """Drafts whose best candidate is what comes, and whose second best is not; `wrong_depth` swaps them."""
    tokens = torch.tensor([*answer.example.tokens, *[0] * STEPS])
    head = torch.eye(VOCABULARY)
    states = torch.zeros(len(answer.roots), STEPS, VOCABULARY)
    for row, root in enumerate(answer.roots):
        for depth in range(STEPS):
            came = int(tokens[root + 2 + depth])
            other = (came + 50) % VOCABULARY
            best, second = (other, came) if depth == wrong_depth else (came, other)
            surer = 2.0 if depth == wrong_depth else 5.0
            states[row, depth, best], states[row, depth, second] = 25.0, 25.0 - surer
    return drafts_from_states(answer, [states], head)


def test_acceptance_length_of_planted_drafts_is_known() -> None:
    answer = as_answer([3, 4, 5, 6, 7, 8, 9, 10])
    right, wrong = planted_drafts(answer), planted_drafts(answer, wrong_depth=0)
    outputs = [answer.tokens]

    def length(drafts: Drafts, *shape: int) -> float:
        return measured(
            walk(outputs, OnePassDrafter([drafts], [1.0] * STEPS), *shape), outputs
        ).length

    # 7 tokens after the first: 4 and then 3 of them in a pass.
    assert length(right, STEPS, 1) == length(right, STEPS) == 3.5
    assert length(right, 1) == round(7 / 4, 4)
    assert length(wrong, STEPS, 1) == length(wrong, 1) == 1.0
    # The second best child of the root is in a tree of six nodes, with its own best path.
    assert length(wrong, 2 * STEPS) == 3.5
    assert right.ranks.max() == 0
    assert (wrong.ranks[:, 0] == 1).all()
    # The last rows stand beyond the end: two of depth 3, one of depth 2.
    assert (right.ranks < 0).sum(0).tolist() == [0, 1, 2]


def test_roots_and_text_without_a_prompt() -> None:
    answer = as_answer([3, 4, 5])
    assert answer.root(1) == 1  # the last token of the prompt; token 3 has just been sampled
    assert list(answer.roots) == [1, 2]
    text = JudgedAnswer.of(Example("t", "text", None, [7], list(range(400))), 96)
    assert text.first == TEXT_CONTEXT
    assert text.tokens == tuple(range(127, 223))
    short = JudgedAnswer.of(Example("t", "text", None, [7], list(range(9))), 96)
    assert short.first == 5
    assert judged_answers([Example("t", "text", None, [7, 8], [9])], 96) == []


def test_drafts_are_the_softmax_of_the_maps_logits(
    target: FrozenTarget, cache: PrefixCache, examples: list[Example]
) -> None:
    maps = random_maps("token")
    found = draft(target, cache, maps, JudgedAnswer.of(examples[0], 12))
    assert found.tokens.shape == (11, STEPS, 64)
    root = found.answer.root(4)
    tokens = torch.tensor(examples[0].tokens)
    hidden = cache.read("hidden", examples[0])[root][None]
    pseudo = maps(hidden, target.embed(tokens[root + 1])[None])[None]
    states = target.run_rows(pseudo, torch.tensor([[root]]), cache.prefixes(examples[:1]))[0, 0]
    for temperatures in ([1.0] * STEPS, [0.5, 0.8, 2.5]):
        scaled = (states @ target.head_weight.T) / torch.tensor(temperatures)[:, None]
        expected, order = scaled.log_softmax(-1).sort(descending=True)
        assert found.tokens[3].tolist() == order[:, :64].tolist()
        np.testing.assert_allclose(
            found.log_probabilities(temperatures)[3], expected[:, :64], atol=2e-4
        )
    assert found.came[3].tolist() == examples[0].answer[4 : 4 + STEPS]
    with pytest.raises(ValueError, match="it must lie between"):
        found.log_probabilities([9.0] * STEPS)


def test_drafts_of_a_vocabulary_are_the_softmax_over_it(
    target: FrozenTarget, cache: PrefixCache, examples: list[Example]
) -> None:
    maps, listed = random_maps("token"), np.arange(0, VOCABULARY, 2, dtype=np.int32)
    answer = judged_answers(examples, 96)[0]
    tokens = answer.example.tokens
    every = draft(target, cache, maps, answer)
    found = draft(target, cache, maps, answer, vocabulary=DraftVocabulary(listed, VOCABULARY))
    scores, whole = (one.log_probabilities([1.3] * STEPS) for one in (found, every))
    own_tokens = 0
    for row, root in enumerate(answer.roots):
        allowed = {*listed.tolist(), *tokens[: root + 2]}
        own_tokens += len(allowed) - len(listed)
        for depth in range(STEPS):
            inside = np.isin(every.tokens[row, depth], list(allowed))
            drafted = found.tokens[row, depth][np.isfinite(scores[row, depth])]
            common = every.tokens[row, depth][inside]
            assert set(drafted.tolist()) <= allowed
            assert drafted[: len(common)].tolist() == common.tolist()
            # Each is as much more probable as all that is left out was.
            gain = scores[row, depth][: len(common)] - whole[row, depth][inside]
            assert gain == pytest.approx(gain[0], abs=1e-3)
            assert gain[0] > 0
            came = found.came[row, depth]
            assert np.isfinite(found.came_logits[row, depth]) == (came in allowed)
            if came >= 0 and came not in allowed:
                assert found.ranks[row, depth] == found.tokens.shape[-1]
    assert own_tokens > 50


class Oracle(TransferMaps):
    """Returns the true states of one example in place of mapped ones."""

    def __init__(self, target: FrozenTarget, example: Example) -> None:
        super().__init__(STEPS, SIZE)
        self.states = target.prefix(torch.tensor(example.tokens)).hidden
        self.first = len(example.prompt) - 1

    def forward(
        self, hidden: torch.Tensor, token_embedding: torch.Tensor | None = None
    ) -> torch.Tensor:
        roots = torch.arange(self.first, self.first + len(hidden))
        places = (roots[:, None] + torch.arange(1, STEPS + 1)).clamp(max=len(self.states) - 1)
        return self.states[places]


def test_true_states_draft_what_came(
    target: FrozenTarget, cache: PrefixCache, examples: list[Example]
) -> None:
    greedy = [example for example in examples if example.temperature == 0.0]
    drafts = [draft(target, cache, Oracle(target, e), JudgedAnswer.of(e, 96)) for e in greedy]
    judged = Judged(drafts, OnePassDrafter(drafts, [1.0] * STEPS), [1.0] * STEPS)
    (group,) = judge(judged, 64, SILENT)
    assert min(depth.top1 for depth in group.depths) > 0.98
    assert group.depths[0].reached == 1.0
    assert group.output_tokens == sum(len(example.answer) for example in greedy)


def test_calibration_finds_the_temperature() -> None:
    rng = np.random.default_rng(0)
    count, vocabulary = 4000, 50
    logits = rng.normal(size=(count, 1, vocabulary)) * 3
    for true in (0.67, 1.0, 1.83):
        came = (logits[:, 0] / true + rng.gumbel(size=(count, vocabulary))).argmax(-1)
        answer = as_answer([0, *came.tolist()])
        answer = JudgedAnswer(answer.example, 2, tuple(answer.example.answer))
        drafts = drafts_from_states(
            answer, [torch.from_numpy(logits).float()], torch.eye(vocabulary)
        )
        (found,) = fit_temperatures([drafts])
        assert found == pytest.approx(true, rel=0.05)
        exact = logits[:, 0] / found
        exact = np.log(np.exp(exact).sum(-1)) - exact[np.arange(count), came]
        (loss,) = negative_log_likelihood([drafts], [found])
        assert loss == pytest.approx(exact.mean(), abs=1e-3)
        assert loss < negative_log_likelihood([drafts], [found * 1.2])[0]
        assert loss < negative_log_likelihood([drafts], [found / 1.2])[0]
        calibrated, raw = (
            calibration_error(reliability([drafts], [temperature])[0])
            for temperature in (found, 1.0)
        )
        assert calibrated < 0.01
        assert true == 1.0 or calibrated < raw / 2


def test_reliability_bins() -> None:
    claimed = np.array([0.05, 0.05, 0.1, 0.95, 1.0, 0.0])
    right = np.array([False, True, False, True, True, False])
    bins = bin_probabilities(claimed, right)
    assert [item.nodes for item in bins] == [3, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert bins[0].claimed == pytest.approx(0.1 / 3, abs=1e-5)
    assert bins[0].right == pytest.approx(1 / 3, abs=1e-5)
    assert bins[9].right == 1.0
    expected = (3 * (1 / 3 - 0.1 / 3) + 1 * 0.1 + 2 * 0.025) / 6
    assert calibration_error(bins) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def one_path_at_a_time(
    target: FrozenTarget,
    cache: PrefixCache,
    maps: TransferMaps,
    answer: JudgedAnswer,
    known: int,
    beam: int,
) -> dict[tuple[int, ...], float]:
    """Log-probability of every path that chained drafting sees, each computed alone."""
    temperatures = (0.9, 1.1, 1.3)
    root = answer.root(known)
    prefixes = cache.prefixes([answer.example])
    hidden = cache.read("hidden", answer.example)[root][None]
    seen: dict[tuple[int, ...], float] = {}
    level: dict[tuple[int, ...], float] = {(): 0.0}
    for temperature in temperatures:
        grown: dict[tuple[int, ...], float] = {}
        for path, score in level.items():
            tokens = torch.tensor([[answer.tokens[known - 1], *path]])
            pseudo = maps(hidden, target.embed(tokens))[None]
            state = target.run_rows(pseudo, torch.tensor([[root]]), prefixes)[0, 0, -1]
            scores = (state @ target.head_weight.T / temperature).log_softmax(-1)
            for token, value in enumerate(scores.tolist()):
                grown[*path, token] = score + value
        seen |= grown
        level = dict(sorted(grown.items(), key=lambda item: -item[1])[:beam])
    return seen


def paths_of(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(tree.tokens[tree.path(node)].tolist()) for node in range(len(tree))}


def test_chained_trees_equal_one_path_at_a_time(
    target: FrozenTarget, cache: PrefixCache, examples: list[Example]
) -> None:
    maps = random_maps("chained")
    answers = judged_answers(examples, 96)
    drafter = ChainedDrafter(target, cache, maps, answers, [0.9, 1.1, 1.3])
    places = [Place(2, 1), Place(0, 9), Place(4, 5)]
    for budget in (6, 64):
        trees = drafter.trees(places, budget)
        for place, tree in zip(places, trees, strict=True):
            seen = one_path_at_a_time(
                target, cache, maps, answers[place.answer], place.known, beam=8
            )
            best = sorted(seen, key=lambda path: -seen[path])[:budget]
            assert paths_of(tree) == set(best)
            assert len(tree) == budget
    chains = drafter.trees(places, STEPS, branching=1)
    for place, chain in zip(places, chains, strict=True):
        assert chain.is_chain
        seen = one_path_at_a_time(target, cache, maps, answers[place.answer], place.known, beam=1)
        (best_leaf,) = [
            max((path for path in seen if len(path) == STEPS), key=lambda path: seen[path])
        ]
        assert tuple(chain.tokens.tolist()) == best_leaf
    with pytest.raises(ValueError, match="up to 64"):
        drafter.trees(places, 65)


@torch.no_grad()
def test_chained_drafts_follow_what_came(
    target: FrozenTarget, cache: PrefixCache, examples: list[Example]
) -> None:
    maps = random_maps("chained")
    answer = JudgedAnswer.of(examples[0], 96)
    found = draft(target, cache, maps, answer)
    known = 5
    path = torch.tensor([answer.tokens[known - 1 : known + 2]])
    hidden = cache.read("hidden", examples[0])[answer.root(known)][None]
    pseudo = maps(hidden, target.embed(path))[None]
    roots = torch.tensor([[answer.root(known)]])
    states = target.run_rows(pseudo, roots, cache.prefixes(examples[:1]))[0, 0]
    expected = (states @ target.head_weight.T).log_softmax(-1).max(dim=-1)
    assert found.tokens[known - 1, :, 0].tolist() == expected.indices.tolist()
    probabilities = found.log_probabilities([1.0] * STEPS)[known - 1, :, 0]
    np.testing.assert_allclose(probabilities, expected.values, atol=1e-4)


@pytest.mark.parametrize("conditioning", ["none", "token", "chained"])
@pytest.mark.slow
def test_the_study_holds_together(
    target: FrozenTarget, cache: PrefixCache, examples: list[Example], conditioning: Conditioning
) -> None:
    maps, temperatures = random_maps(conditioning), [1.0] * STEPS
    drafts = draft_with_maps(target, cache, maps, judged_answers(examples, 20), SILENT)
    drafter = maps_drafter(target, cache, maps, drafts, temperatures)
    groups = judge(Judged(drafts, drafter, temperatures), 6, SILENT)
    assert [group.name for group in groups] == ["greedy", "temperature 0.8", "other text"]
    assert [group.answers for group in groups] == [3, 2, 2]
    for group in groups:
        assert [budget.nodes for budget in group.budgets] == [1, 2, 4, 6, 8, 16, 32, 64]
        lengths = [budget.found.length for budget in group.budgets]
        assert lengths[-1] >= lengths[0] >= 1.0
        assert group.chain.length <= group.at(64).length
        # 20 tokens: all passes start within the first 48.
        assert group.opening == group.at(6)
        assert group.rest is None
        assert group.kinds.keys() <= {"chat", "code"}
        for depth in group.depths:
            assert 0 <= depth.top1 <= depth.top5 <= depth.top10 <= 1
            assert depth.loss == depth.uncalibrated_loss > 0
        reached = [depth.reached for depth in group.depths]
        assert reached == sorted(reached, reverse=True)
        low, high = group.at(6).low, group.at(6).high
        assert low is not None
        assert high is not None
        assert low <= group.at(6).length <= high


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.slow
def test_eval_in_half_precision(folders: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    """The target in half the memory gives nearly the fp32 study."""
    studies = []
    for name in ("float32", dtype):
        output = tmp_path / name
        options = arguments(folders, "eval", "--output", str(output), "--dtype", name)
        result = runner.invoke(app, options)
        assert result.exit_code == 0, result.output
        studies.append(Study.model_validate_json((output / "eval.json").read_text()))
    exact, half = (study.groups for study in studies)
    for one, other in zip(exact, half, strict=True):
        assert other.chain.length == pytest.approx(one.chain.length, rel=0.1)
        losses = [depth.loss for depth in one.depths]
        assert [depth.loss for depth in other.depths] == pytest.approx(losses, rel=0.02)


def test_a_single_answer_has_no_interval() -> None:
    found = measured([Walk([4, 3], [3, 2])], [list(range(8))])
    assert (found.length, found.low, str(found)) == (3.5, None, "3.50")


def test_limits_are_spread_over_each_group() -> None:
    examples = [
        Example(str(number), "chat", (0.0, 0.8, None)[number % 3], [1, 2], [3, 4])
        for number in range(30)
    ]
    chosen = spread_by_group(examples, 2)
    assert [example.id for example in chosen] == ["0", "15", "1", "16", "2", "17"]
    assert len(spread_by_group(examples, 100)) == 30


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM, examples: list[Example]
) -> dict[str, Path]:
    """A target, a checkpoint for it, and answers, as the commands take them."""
    root = tmp_path_factory.mktemp("study")
    paths = {name: root / name for name in ("target", "maps", "answers.jsonl")}
    model.save_pretrained(paths["target"])
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", eos_token="w1"
    ).save_pretrained(paths["target"])
    config = TransferConfig(
        speculators_config=SpeculatorsConfig(
            verifier=Verifier(name_or_path="tiny", architectures=("LlamaForCausalLM",))
        ),
        num_transfer_steps=STEPS,
        transfer_layer_ids=(LAYER,),
        conditioning="token",
        calibration=Calibration(temperatures=(1.0,) * STEPS),
        tree=Tree(node_budget=8),
        target=Target(
            hidden_size=SIZE,
            num_hidden_layers=4,
            vocab_size=VOCABULARY,
            fingerprint=fingerprint_target(paths["target"]),
        ),
    )
    save_checkpoint(paths["maps"], config, random_maps("token"))
    lines = [json.dumps(example.record) for example in examples]
    paths["answers.jsonl"].write_text("".join(line + "\n" for line in lines))
    return paths


@pytest.fixture
def nested(folders: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The same with a target whose config.json describes a decoder inside something larger."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.12,
        "tie_word_embeddings": False,
        **{f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos"))},
    }
    target, maps = tmp_path / "nested", tmp_path / "nested-maps"
    shutil.copytree(folders["target"], target)
    config = Emu3Config(text_config=text)
    torch.manual_seed(0)
    Emu3ForCausalLM(config.get_text_config()).save_pretrained(target)
    config.save_pretrained(target)
    assert "hidden_size" not in json.loads((target / "config.json").read_text())
    about, weights = load_checkpoint(folders["maps"])
    fitting = about.target.model_copy(update={"fingerprint": fingerprint_target(target)})
    save_checkpoint(maps, about.model_copy(update={"target": fitting}), weights)
    return {**folders, "target": target, "maps": maps}


def assert_one_sentence(result: Result, words: str) -> None:
    """The command refused, with these words and no traceback."""
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def arguments(folders: dict[str, Path], command: str, *more: str) -> list[str]:
    named = ("target", str(folders["target"])), ("checkpoint", str(folders["maps"]))
    options = [part for name, value in named for part in (f"--{name}", value)]
    return [command, *options, "--data", str(folders["answers.jsonl"]), *more]


@pytest.mark.slow
def test_eval_writes_what_inspect_shows(folders: dict[str, Path]) -> None:
    output = folders["maps"]
    result = runner.invoke(
        app, arguments(folders, "eval", "--output", str(output)), env={"COLUMNS": "160"}
    )
    assert result.exit_code == 0, result.output
    study = Study.model_validate_json((output / "eval.json").read_text())
    assert study.node_budget == 8
    assert study.provenance.trained_for_this_target
    length = str(study.groups[0].at(8))
    page = (output / "eval.md").read_text()
    for name in ("acceptance_by_budget.png", "acceptance_by_depth.png", "reliability.png"):
        assert (output / name).stat().st_size > 5000
        assert name in page
    assert length in page
    assert study.provenance.target_fingerprint in page
    # Without vLLM, as on a machine that only trains.
    code = (
        "import sys; sys.modules['vllm'] = None; from vllm_hidden_transfer.cli import app; "
        f"app(['inspect', {str(output)!r}])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"COLUMNS": "160"}
    )
    assert shown.returncode == 0, shown.stderr
    assert length in shown.stdout
    assert "make a new one" not in shown.stdout
    config, maps = load_checkpoint(output)
    tree = config.tree.model_copy(update={"node_budget": 4})
    save_checkpoint(output, config.model_copy(update={"tree": tree}), maps)
    changed = runner.invoke(app, ["inspect", str(output)])
    assert "make a new one" in " ".join(changed.output.split())
    save_checkpoint(output, config, maps)
    (output / "eval.json").write_text("{}")
    broken = runner.invoke(app, ["inspect", str(output)])
    assert broken.exit_code == 1
    assert "no study of this version" in " ".join(broken.output.split())
    (output / "eval.json").unlink()


@pytest.mark.slow
def test_a_written_vocabulary_is_what_is_judged(
    folders: dict[str, Path], examples: list[Example], tmp_path: Path
) -> None:
    changed = {**folders, "maps": tmp_path / "maps"}
    shutil.copytree(folders["maps"], changed["maps"])
    output = ("--output", str(changed["maps"]), "--cache", str(tmp_path / "cache"))
    assert runner.invoke(app, arguments(changed, "eval", *output)).exit_code == 0
    result = runner.invoke(app, arguments(changed, "vocabulary", "--size", "30"))
    assert result.exit_code == 0, result.output
    counted = [example.answer for example in examples]
    listed = load_vocabulary(changed["maps"], load_checkpoint(changed["maps"])[0])
    assert listed is not None
    assert listed.tolist() == most_used(counted, 30, VOCABULARY).tolist()
    shown = runner.invoke(app, ["inspect", str(changed["maps"])], env={"COLUMNS": "160"})
    assert "30 tokens and each request's own" in shown.output
    assert "another draft vocabulary" in shown.output
    whole = Study.model_validate_json((changed["maps"] / "eval.json").read_text())
    assert runner.invoke(app, arguments(changed, "eval", *output)).exit_code == 0
    study = Study.model_validate_json((changed["maps"] / "eval.json").read_text())
    assert (whole.draft_vocabulary, study.draft_vocabulary) == (None, 30)
    assert study.groups[0].depths != whole.groups[0].depths
    shown = runner.invoke(app, ["inspect", str(changed["maps"])], env={"COLUMNS": "160"})
    assert "another draft vocabulary" not in shown.output
    assert runner.invoke(app, arguments(changed, "tune")).exit_code == 0


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        ({"target": "no"}, (), "There is no target model in"),
        ({"maps": "no"}, (), "does not exist"),
        ({"answers.jsonl": "no"}, ("--size", "30"), "does not exist"),
        ({}, ("--size", "102"), "--size is 102, but the target has 101 tokens in all"),
        ({"target": "other"}, (), "a vocabulary of 101, but"),
        ({"maps": "chained"}, (), "are chained: those draft from all tokens"),
    ],
)
def test_a_vocabulary_that_cannot_be_written_is_one_sentence(
    folders: dict[str, Path],
    tmp_path: Path,
    change: dict[str, str],
    more: tuple[str, ...],
    words: str,
) -> None:
    tiny_llama(90).save_pretrained(tmp_path / "other")
    config, _ = load_checkpoint(folders["maps"])
    chained = config.model_copy(update={"conditioning": "chained"})
    save_checkpoint(tmp_path / "chained", chained, random_maps("chained"))
    changed = {**folders, **{name: tmp_path / value for name, value in change.items()}}
    result = runner.invoke(app, arguments(changed, "vocabulary", *more))
    assert_one_sentence(result, words)
    assert not (changed["maps"] / VOCABULARY_FILE).exists()


@pytest.mark.slow
def test_tune_writes_its_settings_and_nothing_else(folders: dict[str, Path]) -> None:
    path = folders["maps"] / "config.json"
    before, weights = (
        json.loads(path.read_text()),
        (folders["maps"] / "model.safetensors").read_bytes(),
    )
    result = runner.invoke(app, arguments(folders, "tune"), env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    after = json.loads(path.read_text())
    temperatures = after["calibration"].pop("temperatures")
    assert before["calibration"].pop("temperatures") == [1.0] * STEPS
    assert temperatures != [1.0] * STEPS
    assert after == before
    assert (folders["maps"] / "model.safetensors").read_bytes() == weights
    # Dear rows: the smallest tree. Free ones: as large as helps.
    for cost, expected in (("9", {1}), ("0", {16, 24, 32, 48, 64})):
        costs = ("--row-cost", cost, "--draft-cost", "0.5")
        result = runner.invoke(app, arguments(folders, "tune", *costs), env={"COLUMNS": "120"})
        assert result.exit_code == 0, result.output
        config, _ = load_checkpoint(folders["maps"])
        assert config.tree.node_budget in expected
        assert list(config.calibration.temperatures) == temperatures
        assert "tokens per unit of cost" in result.output


def test_tune_judges_on_what_it_was_not_fitted_on(
    folders: dict[str, Path], target: FrozenTarget, cache: PrefixCache, examples: list[Example]
) -> None:
    maps = random_maps("token")
    config, _ = load_checkpoint(folders["maps"])
    answers = judged_answers(examples, 20)
    prepared = Prepared(config, maps, None, target, "fingerprint", cache, answers)
    tuned = tune(prepared, StepCosts(row=0.1, draft=0.5), SILENT)
    drafts = draft_with_maps(target, cache, maps, answers, SILENT)
    fitted = [drafts[number] for number in (0, 2, 3, 5)]  # every second of each temperature
    others = [drafts[number] for number in (1, 4, 6)]
    assert tuned.after.temperatures == fit_temperatures(fitted) != fit_temperatures(others)
    for quality in (tuned.before, tuned.after):
        losses = [negative_log_likelihood(half, quality.temperatures) for half in (others, fitted)]
        assert quality.losses == losses[0] != losses[1]
        lengths = []
        for half in (others, fitted):
            drafter = maps_drafter(target, cache, maps, half, quality.temperatures, shares=SHARES)
            outputs = [item.answer.tokens for item in half]
            lengths.append(measured(walk(outputs, drafter, quality.node_budget), outputs))
        assert quality.length == lengths[0] != lengths[1]


def test_a_nested_config_is_read_where_the_decoder_is_described(
    nested: dict[str, Path], tmp_path: Path
) -> None:
    for command in (("eval", "--output", str(tmp_path / "out")), ("tune",)):
        result = runner.invoke(app, arguments(nested, *command, "--max-tokens", "12"))
        assert result.exit_code == 0, result.output
    assert Study.model_validate_json((tmp_path / "out" / "eval.json").read_text()).groups
    about, maps = load_checkpoint(nested["maps"])
    other = about.target.model_copy(update={"vocab_size": VOCABULARY - 1})
    save_checkpoint(nested["maps"], about.model_copy(update={"target": other}), maps)
    result = runner.invoke(app, arguments(nested, "tune"))
    assert result.exit_code == 1
    assert f"vocab_size {VOCABULARY - 1}, but" in " ".join(result.output.split())


@pytest.mark.slow
def test_a_checkpoint_for_other_weights_needs_the_override(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config, maps = load_checkpoint(folders["maps"])
    other = config.model_copy(
        update={"target": config.target.model_copy(update={"fingerprint": "x"})}
    )
    save_checkpoint(tmp_path / "maps", other, maps)
    changed = {**folders, "maps": tmp_path / "maps"}
    output = ("--output", str(tmp_path / "out"), "--max-tokens", "12", "--limit", "2")
    result = runner.invoke(app, arguments(changed, "eval", *output))
    assert result.exit_code == 1
    assert "--allow-target-mismatch" in result.output
    result = runner.invoke(app, arguments(changed, "eval", *output, "--allow-target-mismatch"))
    assert result.exit_code == 0, result.output
    assert "judged all the same" in " ".join(result.output.split())
    assert "trained for other weights" in (tmp_path / "out" / "eval.md").read_text()


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        ({"target": "no"}, (), "There is no target model in"),
        ({"maps": "no"}, (), "does not exist"),
        ({"answers.jsonl": "no"}, (), "does not exist"),
        ({}, ("--held-out",), "does not say what was held out of its training"),
        ({}, ("--cache", "{foreign}"), "another target, transfer layer or dtype"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_sentence(
    folders: dict[str, Path],
    tmp_path: Path,
    change: dict[str, str],
    more: tuple[str, ...],
    words: str,
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "about.json").write_text('{"fingerprint": "x", "layer": 1, "version": 1}')
    (foreign / "index").write_text("kept")
    changed = {**folders, **{name: tmp_path / value for name, value in change.items()}}
    given = [part.format(foreign=foreign) for part in more]
    for command in (("eval", "--output", str(tmp_path / "out")), ("tune",)):
        result = runner.invoke(app, arguments(changed, *command, *given))
        assert_one_sentence(result, words)
    assert (foreign / "index").read_text() == "kept"


@pytest.mark.parametrize("command", ["eval", "tune", "vocabulary"])
def test_the_commands_explain_themselves(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.slow
def test_costs_come_together(folders: dict[str, Path]) -> None:
    result = runner.invoke(app, arguments(folders, "tune", "--row-cost", "0.1"))
    assert result.exit_code == 1
    assert "give both" in result.output


@pytest.mark.slow
def test_missing_packages_are_named(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = runner.invoke(app, arguments(folders, "eval", "--output", "out"))
    assert result.exit_code == 1
    assert "vllm-hidden-transfer[train]" in " ".join(result.output.split())


def test_best_first_order_is_topological() -> None:
    from vllm_hidden_transfer.evaluation.chained import _most_probable

    tree = _most_probable(
        np.array([4, 5, 6, 7]), np.array([ROOT, ROOT, 0, 1]), np.array([-0.5, -0.1, -0.5, -2.0])
    )
    assert tree.tokens.tolist() == [5, 4, 6, 7]
    assert tree.parents.tolist() == [ROOT, ROOT, 1, 0]
