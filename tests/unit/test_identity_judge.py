# SPDX-License-Identifier: Apache-2.0
"""The judge of identity: planted wrong texts are seen, rounding is told from them, and nothing hides behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.support.models import tiny_llama
from vllm_hidden_transfer.bench.identity import (
    ROW_COUNTS,
    TAIL,
    Finding,
    Judgement,
    TransformersReference,
    Verdict,
    judge,
    parting,
)

VOCABULARY, LENGTH = 256, 20
PROMPTS = [[7, 11, 200, 31, 5], [3], [90, 91, 92, 17, 18, 19, 20, 21, 22, 23, 24]]
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge") / "target"
    tiny_llama(VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def references(target: Path) -> dict[str, TransformersReference]:
    return {dtype: TransformersReference(target, dtype) for dtype in ("float32", "bfloat16")}


def never(prefixes: list[list[int]], lengths: list[int]) -> list[list[int]]:
    raise AssertionError("nothing was to be asked again")


@torch.inference_mode()
def one_pass(reference: TransformersReference, tokens: list[int]) -> torch.Tensor:
    return reference._model(torch.tensor([tokens])).logits[0]


def greedy(reference: TransformersReference) -> Callable[[list[list[int]], list[int]], list]:
    """What the target itself answers."""

    def ask(prefixes: list[list[int]], lengths: list[int]) -> list[list[int]]:
        answers = []
        for prefix, length in zip(prefixes, lengths, strict=True):
            tokens = list(prefix)
            for _ in range(length):
                tokens.append(int(one_pass(reference, tokens)[-1].argmax()))
            answers.append(tokens[len(prefix) :])
        return answers

    return ask


def clear_place(reference: TransformersReference, prompt: list[int], answer: list[int]) -> int:
    """Where the best token leads the second by most."""
    tops = one_pass(reference, [*prompt, *answer])[len(prompt) - 1 : -1].topk(2).values
    return int((tops[:, 0] - tops[:, 1]).argmax())


@DTYPES
def test_identical_texts_never_load_the_target(dtype: str) -> None:
    found = judge(PROMPTS, PROMPTS, PROMPTS, TransformersReference("nowhere", dtype), never)
    assert found == Judgement((Verdict.IDENTICAL,) * 3, ())
    assert str(found) == "identical: 3, rounding: 0, wrong: 0 of 3"


@DTYPES
@pytest.mark.parametrize("rank", [1, 2, 30, VOCABULARY - 1])
def test_a_planted_token_is_wrong(
    dtype: str, rank: int, references: dict[str, TransformersReference]
) -> None:
    """The second best with a clear gap, and tokens from far ranks, each with the answer that follows from it."""
    reference = references[dtype]
    ask = greedy(reference)
    expected = ask(PROMPTS, [LENGTH] * 3)
    tested = [list(text) for text in expected]
    place = clear_place(reference, PROMPTS[1], expected[1])
    start = expected[1][:place]
    ranked = one_pass(reference, [*PROMPTS[1], *start])[-1].argsort(descending=True)
    planted = [*start, int(ranked[rank])]
    tested[1] = [*planted, *ask([[*PROMPTS[1], *planted]], [LENGTH - place - 1])[0]]
    found = judge(PROMPTS, expected, tested, reference, never)
    assert found.verdicts == (Verdict.IDENTICAL, Verdict.WRONG, Verdict.IDENTICAL)
    (one,) = found.findings
    assert (one.prompt, one.position) == (1, place)
    assert (one.expected, one.tested) == (expected[1][place], planted[-1])
    assert one.gap > one.bound
    assert f"gap {one.gap:.3g}, spread {one.spread:.3g}" in str(one)
    assert str(one).endswith(": wrong")
    assert "\n" not in str(one)


@DTYPES
@pytest.mark.parametrize("length", [0, LENGTH - 1, LENGTH + 1])
def test_a_text_of_another_length_is_wrong(
    dtype: str, length: int, references: dict[str, TransformersReference]
) -> None:
    expected = [list(range(10, 10 + LENGTH))]
    tested = [list(range(10, 10 + length))]
    found = judge(PROMPTS[:1], expected, tested, references[dtype], never)
    assert found.verdicts == (Verdict.WRONG,)
    assert ("goes on" if length > LENGTH else "cut short") in str(found)


@dataclass
class FakeReference:
    """Logits of a vocabulary of 8 by the number of answer tokens; 5 best where nothing is said."""

    places: dict[int, list[list[float]]] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16

    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        default = [[0.0, 0, 0, 0, 0, 8, 1, 2]] * 3
        return torch.tensor(self.places.get(len(answer), default))


NEAR = [[0, 8.1, 8.0, 0, 0, 0, 0, 0], [0, 8.0, 8.1, 0, 0, 0, 0, 0], [0.0, 8.1, 8.1, 0, 0, 0, 0, 0]]
"""Row counts that disagree on whether 1 or 2 is best."""


def test_row_counts_that_disagree_make_rounding_and_the_rest_is_asked_again() -> None:
    asked = []

    def ask(prefixes: list[list[int]], lengths: list[int]) -> list[list[int]]:
        asked.append((prefixes, lengths))
        return [[6, 7]]

    reference = FakeReference({1: NEAR})
    found = judge([[3], [4]], [[5, 1, 9, 9], [5]], [[5, 2, 6, 7], [5]], reference, ask)
    assert asked == [([[3, 5, 2]], [2])]
    assert found.verdicts == (Verdict.ROUNDING, Verdict.IDENTICAL)
    assert str(found).splitlines() == [
        "identical: 1, rounding: 1, wrong: 0 of 2",
        "prompt 0, token 1: 2 for 1: gap 0, spread 0.2: rounding",
    ]


def test_a_wrong_token_after_a_rounding_is_seen() -> None:
    reference = FakeReference({1: NEAR})
    tested = [[5, 2, 5, 7, 5]]
    found = judge([[3]], [[5, 1, 9, 9, 9]], tested, reference, lambda *_: [[5, 5, 5]])
    assert [one.verdict for one in found.findings] == [Verdict.ROUNDING, Verdict.WRONG]
    assert found.findings[1].position == 3
    assert found.verdicts == (Verdict.WRONG,)


@pytest.mark.parametrize(("rest", "reason"), [([5], "cut short"), ([5, 5, 5, 5], "goes on")])
def test_a_wrong_length_after_a_rounding_is_seen(rest: list[int], reason: str) -> None:
    reference = FakeReference({1: NEAR})
    found = judge([[3]], [[5, 1, 9, 9, 9]], [[5, 2, *rest]], reference, lambda *_: [[5, 5, 5]])
    assert found.verdicts == (Verdict.WRONG,)
    assert reason in str(found)


def test_tokens_that_tie_far_behind_the_best_are_wrong() -> None:
    rows = [[0.0, 2.1, 2.0, 0, 0, 8, 0, 0], [0.0, 2.0, 2.1, 0, 0, 8, 0, 0]]
    found = judge([[3]], [[1, 4]], [[2, 4]], FakeReference({0: rows}), never)
    assert found.verdicts == (Verdict.WRONG,)
    assert "behind the best" in str(found)


def test_a_shift_of_all_logits_is_no_spread() -> None:
    row = torch.tensor([0.0, 8.0, 7.5, 0, 0, 0, 0, 0])
    rows = [(row + shift).tolist() for shift in (0, 1, 2)]
    found = judge([[3]], [[1]], [[2]], FakeReference({0: rows}), never)
    assert found.verdicts == (Verdict.WRONG,)


@pytest.mark.parametrize(
    ("second", "verdict"), [(16.0, "rounding"), (15.9375, "rounding"), (15.75, "wrong")]
)
def test_one_unit_in_the_last_place_of_bf16_is_rounding(second: float, verdict: str) -> None:
    """At 16 that is 0.125, where all row counts agree."""
    rows = [[0.0, 16.0, second, 0, 0, 0, 0, 0]] * 3
    found = judge([[3]], [[1]], [[2]], FakeReference({0: rows}), never)
    assert found.verdicts == (Verdict(verdict),)


@pytest.mark.parametrize(("share", "verdict"), [(0.9e-5, "rounding"), (1.1e-5, "wrong")])
def test_the_bound_of_fp32_is_fixed(share: float, verdict: str) -> None:
    """Whatever the row counts say."""
    rows = [[0.0, 64.0, 64.0 * (1 - share), move, 0, 0, 0, 0] for move in (0.0, 1.0)]
    found = judge([[3]], [[1]], [[2]], FakeReference({0: rows}, torch.float32), never)
    assert found.verdicts == (Verdict(verdict),)
    assert "bound 0.00064" in str(found)


def test_nan_is_wrong() -> None:
    found = judge([[3]], [[1]], [[2]], FakeReference({0: [[float("nan")] * 8] * 3}), never)
    assert found.verdicts == (Verdict.WRONG,)


def test_parting_over_and_over_is_wrong() -> None:
    """An engine whose every token ties has something else the matter."""
    reference = FakeReference(dict.fromkeys(range(64), NEAR))
    found = judge([[3]], [[1] * 64], [[2] * 64], reference, lambda _, sizes: [[1] * sizes[0]])
    assert found.verdicts == (Verdict.WRONG,)
    assert len(found.findings) == 64 // 8 + 1
    assert "too often" in str(found)


@pytest.mark.parametrize(
    ("tested", "verdict"),
    [([5, 2], "rounding"), ([5, 2, 5], "wrong"), ([5, 1], "wrong"), ([5, 1, 5, 0], "identical")],
)
def test_an_end_token_ends_the_comparison(tested: list[int], verdict: str) -> None:
    """2 and 0 end an answer of at most 8 tokens; the expected one ended after 4."""
    reference = FakeReference({1: NEAR})
    found = judge([[3]], [[5, 1, 5, 0]], [tested], reference, never, limits=[8], ends={0, 2})
    assert found.verdicts == (Verdict(verdict),)


def test_the_rest_may_be_longer_than_the_expected_text() -> None:
    asked = []

    def ask(prefixes: list[list[int]], lengths: list[int]) -> list[list[int]]:
        asked.append(lengths)
        return [[5, 5, 5, 0]]

    reference = FakeReference({1: NEAR})
    tested = [[5, 2, 5, 5, 5, 0]]
    found = judge([[3]], [[5, 1, 0]], tested, reference, ask, limits=[8], ends={0})
    assert asked == [[6]]
    assert found.verdicts == (Verdict.ROUNDING,)


@pytest.mark.parametrize("sizes", [(5, 0), (1, 1), (9, 3), (40, 50), (20, TAIL + 13)])
def test_the_reference_computes_the_same_token_with_every_row_count(
    sizes: tuple[int, int], references: dict[str, TransformersReference]
) -> None:
    """In fp32 all ways agree with one plain pass, and in bf16 they do about."""
    generator = torch.Generator().manual_seed(sum(sizes))
    tokens = torch.randint(VOCABULARY, (sum(sizes),), generator=generator).tolist()
    prompt, answer = tokens[: sizes[0]], tokens[sizes[0] :]
    exact = references["float32"]
    plain = one_pass(exact, tokens)[-1]
    found = exact.logits(prompt, answer)
    assert found.shape == (len(ROW_COUNTS), VOCABULARY)
    torch.testing.assert_close(found, plain.expand_as(found))
    low = references["bfloat16"].logits(prompt, answer)
    assert low.shape == (len(ROW_COUNTS) + 1, VOCABULARY)
    torch.testing.assert_close(low, plain.expand_as(low), atol=0.15, rtol=0.05)
    assert (low[:-1] != low[-1]).any()


def test_the_rows_of_a_pass(references: dict[str, TransformersReference]) -> None:
    """The last pass has so many rows as it should, and the answer's end is computed with as many."""
    reference = references["float32"]
    seen: list[int] = []
    hook = reference._model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    reference.logits(list(range(40)), list(range(20)))
    hook.remove()
    assert seen[0] == 60 - 34  # 34 = twice 17; shared by all
    assert seen[1:] == [
        *[14, *[1] * 20],
        *[14, *[2] * 10],
        *[14, *[4] * 5],
        *[10, *[8] * 3],
        *[17] * 2,
        *[1, 33],
    ]


def test_parting() -> None:
    assert parting([1, 2], [1, 2]) is None
    assert parting([1, 2], [1, 3]) == 1
    assert parting([1, 2], [1]) == 1
    assert parting([], [1]) == 0


def test_lists_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        judge([[1]], [[1]], [], FakeReference(), never)


def test_a_finding_prints_in_one_line() -> None:
    one = Finding(2, 7, 11, 13, 0.031, 0.031, 0.062, 0.062, Verdict.ROUNDING)
    assert str(one) == "prompt 2, token 7: 13 for 11: gap 0.031, spread 0.062: rounding"
