# SPDX-License-Identifier: Apache-2.0
"""The trees that the runner keeps for its requests: a chain where a grammar is asked, nothing once they are gone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.doubles import planted
from tests.support.answers import Answer, ask, assert_same
from tests.support.engines import counters_of, engine, planted_options, random_prompts
from tests.support.models import VOCABULARY, add_tokenizer, random_model
from vllm_hidden_transfer.tree import ROOT, TokenTree

pytestmark = pytest.mark.engine

LETTERS = 24
DETOUR, TRUTH = 3, 3
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 48, "ignore_eos": True}


class DetourSource(planted.PlantedSource):
    """Trees of two paths: letters first, which any grammar of letters takes, and the continuation beside them.

    As a chain, such a tree is right for the grammar, and its later nodes stand for texts that are longer than theirs.
    """

    runner: Any
    letters: tuple[int, ...] = ()
    """Tokens of one letter; a test sets them on the class."""

    def __init__(self, runner: object) -> None:
        super().__init__(runner)
        DetourSource.runner = runner

    def tree(self, tokens: planted.Tokens, budget: int) -> TokenTree:
        truth = self.answers.continuation(tokens, TRUTH)
        if not truth:
            return TokenTree.chain([])
        path = [*self.letters[:DETOUR], *truth]
        parents = [ROOT, *range(DETOUR - 1), ROOT, *range(DETOUR, len(path) - 1)]
        return TokenTree(np.array(path), np.array(parents))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("detours")
    planted.write_answers(folder / "answers.json", [], VOCABULARY)
    source = f"{DetourSource.__module__}:{DetourSource.__name__}"
    options = {"skip_tokenizer_init": False, **planted_options(DETOUR + TRUTH, source)}
    with engine(add_tokenizer(random_model(folder / "target")), **options) as opened:
        DetourSource.letters = tuple(opened.get_tokenizer().convert_tokens_to_ids(list("qzx")))
        opened.answers_file = folder / "answers.json"
        yield opened


def of_letters() -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    grammar = StructuredOutputsParams(regex=f"[a-z]{{{LETTERS}}}")
    return {**GREEDY, "ignore_eos": False, "structured_outputs": grammar}


def test_a_request_with_a_grammar_gets_a_chain(llm: Any) -> None:
    """Others in the same batch keep their trees, and accept from them."""
    prompts = random_prompts(6, seed=11)
    sampling = [of_letters() if index % 2 else GREEDY for index in range(len(prompts))]
    planted.write_answers(llm.answers_file, [], VOCABULARY)
    reference = ask(llm, prompts, sampling)
    planted.write_answers(llm.answers_file, [answer.sequence for answer in reference], VOCABULARY)
    before = counters_of(llm)
    answers: list[Answer] = ask(llm, prompts, sampling)
    accepted = counters_of(llm) - before
    for answer in answers[1::2]:
        assert re.fullmatch(f"[a-z]{{{LETTERS}}}", answer.text)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in reference]
    assert accepted.accepted_tokens > 3 * GREEDY["max_tokens"] / 2


def test_logprobs_of_given_ids_keep_their_own_request_without_drafts(llm: Any) -> None:
    """One such request stops nobody else: the others accept, and its own log-probabilities are of the ids it gave."""
    prompts = random_prompts(4, seed=13)
    given = [5, 7, 11]
    sampling = [dict(GREEDY) for _ in prompts]
    sampling[1] |= {"logprobs": len(given), "logprob_token_ids": given}
    planted.write_answers(llm.answers_file, [], VOCABULARY)
    reference = ask(llm, prompts, sampling)
    planted.write_answers(llm.answers_file, [answer.sequence for answer in reference], VOCABULARY)
    before = counters_of(llm)
    answers = ask(llm, prompts, sampling)
    accepted = counters_of(llm) - before
    assert_same(reference, answers)
    assert accepted.accepted_tokens > 2 * GREEDY["max_tokens"] / 2
    assert answers[1].logprobs is not None
    for token, values in zip(answers[1].token_ids, answers[1].logprobs, strict=True):
        assert values.keys() >= {token, *given}


def test_nothing_is_kept_of_requests_that_are_gone(llm: Any) -> None:
    """Finished and aborted ones; vLLM tells the runner of the last ones when it has something else to do."""
    from vllm import SamplingParams

    prompts = random_prompts(6, seed=12)
    planted.write_answers(llm.answers_file, [], VOCABULARY)
    reference = ask(llm, prompts, [GREEDY] * len(prompts))
    planted.write_answers(llm.answers_file, [answer.sequence for answer in reference], VOCABULARY)
    stepping = llm.llm_engine
    for index, prompt in enumerate(prompts):
        length = GREEDY["max_tokens"] - index
        params = SamplingParams(**{**GREEDY, "max_tokens": length})
        stepping.add_request(f"gone-{index}", {"prompt_token_ids": prompt}, params)
    for _ in range(4):
        stepping.step()
    assert len(DetourSource.runner.trees) == len(prompts)
    stepping.abort_request(["gone-2", "gone-3"])
    while stepping.has_unfinished_requests():
        stepping.step()
    ask(llm, prompts[:1], [GREEDY])
    assert len(DetourSource.runner.trees) <= 1
