# SPDX-License-Identifier: Apache-2.0
"""What is asked: request features (rows) and engine features (settings) of the feature matrix.

The scope table of ``docs/compatibility.md`` is made from these lists and from what the suite recorded
(``tests/matrix/table.py``), so a row's title is what users read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.support.answers import Answer
from tests.support.models import VOCABULARY

Sampling = Mapping[str, Any]
Outcome = Literal["works", "falls back"]

GREEDY: Sampling = {"temperature": 0.0, "max_tokens": 48, "ignore_eos": True}
SEEDED: Sampling = {**GREEDY, "temperature": 0.8}
"""Every request gets a seed of its own besides."""


@dataclass(frozen=True)
class Row:
    """One request feature. Identical means: token ids, text, reasons to end, log-probabilities and ranks."""

    name: str
    title: str
    base: Sampling = field(default_factory=lambda: GREEDY)
    change: Callable[[int, Answer, Any], Sampling] = lambda index, base, tokenizer: {}
    """What the feature adds to a request: from its number, its answer under `base`, and the tokenizer."""
    outcome: Outcome = "works"
    note: str = ""
    runs_on: bool = False
    """Drafts follow the base answer beyond the end of the reference, so that the end lies inside a path."""
    second_turn: bool = False
    """Asked with the greedy row's prompts and answers and something more as prompts."""
    shows: Callable[[Sequence[Answer], Any], bool] = lambda answers, tokenizer: True
    """Whether the reference's answers show the feature at all."""
    first: bool = False
    """Drafts have their truth on the first path: what a request that gets a chain keeps of its tree."""


def always(**sampling: Any) -> Callable[[int, Answer, Any], Sampling]:
    return lambda index, base, tokenizer: sampling


PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2}
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "codes": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[a-z]{4}$"},
            "minItems": 4,
            "maxItems": 4,
        },
    },
    "required": ["colour", "codes"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= item item item item item item item item\nitem ::= "(" [a-f] [a-f] [a-f] ") "'


def structured(**constraint: Any) -> Callable[[int, Answer, Any], Sampling]:
    def change(index: int, base: Answer, tokenizer: Any) -> Sampling:
        from vllm.sampling_params import StructuredOutputsParams

        return {"structured_outputs": StructuredOutputsParams(**constraint), "ignore_eos": False}

    return change


def _stop_string(index: int, base: Answer, tokenizer: Any) -> Sampling:
    middle = tokenizer.decode(base.token_ids[20:22])
    return {"stop": [middle], "include_stop_str_in_output": index % 2 == 0}


def _bad_words(index: int, base: Answer, tokenizer: Any) -> Sampling:
    words = {tokenizer.decode([token]).strip() for token in base.token_ids[5:25:5]}
    two = tokenizer.decode(base.token_ids[30:32])
    return {"bad_words": [*sorted(word for word in words if word and "�" not in word), two]}


THINK, THINK_END = "<think>", "</think>"


def _bias_of(index: int, token: str, tokenizer: Any, strength: float = 6.0) -> Sampling:
    """A random target says this token now and then; how soon differs from request to request."""
    return {"logit_bias": {tokenizer.convert_tokens_to_ids(token): strength + index % 4 / 2}}


def _after_reasoning(constraint: Callable[[int, Answer, Any], Sampling]) -> Any:
    def change(index: int, base: Answer, tokenizer: Any) -> Sampling:
        return {**constraint(index, base, tokenizer), **_bias_of(index, THINK_END, tokenizer)}

    return change


def _thinking_budget(index: int, base: Answer, tokenizer: Any) -> Sampling:
    return {"thinking_token_budget": index, **_bias_of(index, THINK, tokenizer)}


def _reasoning(index: int, base: Answer, tokenizer: Any) -> Sampling:
    kinds: list[Sampling] = [
        {},
        _after_reasoning(structured(regex="[a-z]{30}"))(index, base, tokenizer),
        {"logprobs": 3},
        {"temperature": 0.8, "seed": 7 * index, **_bias_of(index, THINK_END, tokenizer)},
        {**PENALTIES},
        {"temperature": 0.8, "seed": 7 * index, "top_p": 0.9},
        {**_after_reasoning(structured(choice=["yes", "no"]))(index, base, tokenizer)},
        # Last of the batch, because stock leaves its budget to whichever request takes its place.
        _thinking_budget(index, base, tokenizer),
    ]
    return kinds[index % len(kinds)]


def _ends_reasoning(answers: Sequence[Answer], tokenizer: Any) -> bool:
    """Most answers end their reasoning, not all at the same place, and go on after it."""
    end = tokenizer.convert_tokens_to_ids(THINK_END)
    places = [a.token_ids.index(end) for a in answers if end in a.token_ids[:-4]]
    return len(places) > len(answers) / 2 and len(set(places)) > 2


def _is_forced(answers: Sequence[Answer], tokenizer: Any) -> bool:
    """Some reasoning ends, which no answer here does of its own accord."""
    end = tokenizer.convert_tokens_to_ids(THINK_END)
    return sum(end in answer.token_ids for answer in answers) > len(answers) / 2


def _mixed(index: int, base: Answer, tokenizer: Any) -> Sampling:
    seeded = {"temperature": 0.8, "seed": 7 * index}
    kinds: list[Sampling] = [
        {},
        {**seeded, "top_p": 0.9},
        {**PENALTIES},
        {**seeded, **PENALTIES, "min_tokens": 30, "stop_token_ids": base.token_ids[:8]},
        {"logprobs": 3},
        {**seeded, "min_p": 0.1, "logit_bias": {7: 4.0}},
        structured(regex="[a-z]{30}")(index, base, tokenizer),
        _bad_words(index, base, tokenizer),
    ]
    return kinds[index % len(kinds)]


ROWS: tuple[Row, ...] = (
    Row("greedy", "greedy"),
    Row("seeded", "seeded sampling at a temperature", SEEDED),
    Row("top_k", "top-k", SEEDED, always(top_k=20)),
    Row("top_p", "top-p", SEEDED, always(top_p=0.8)),
    Row("min_p", "min_p", SEEDED, always(min_p=0.2), note="stock vLLM refuses it with speculation"),
    Row(
        "logit_bias",
        "logit_bias",
        SEEDED,
        lambda index, base, _: {"logit_bias": dict.fromkeys(base.token_ids[::3], -3.0)},
        note="stock vLLM refuses it with speculation",
    ),
    Row("penalties", "repetition, presence and frequency penalties", GREEDY, always(**PENALTIES)),
    Row("penalties_seeded", "penalties with seeded sampling", SEEDED, always(**PENALTIES)),
    Row("bad_words", "bad_words", GREEDY, _bad_words),
    Row(
        "allowed_token_ids",
        "allowed_token_ids",
        SEEDED,
        lambda index, *_: {"allowed_token_ids": list(range(10 + index, VOCABULARY, 3))},
    ),
    Row(
        "min_tokens",
        "min_tokens",
        GREEDY,
        # Odd ones may stop exactly where the minimum ends, which is inside a path as often as not.
        lambda index, base, _: {
            "min_tokens": 30,
            "stop_token_ids": base.token_ids[30:31] if index % 2 else base.token_ids[4:40:4],
        },
        runs_on=True,
    ),
    Row(
        "stop_ids",
        "stop ids inside an accepted path",
        GREEDY,
        lambda index, base, _: {"stop_token_ids": [base.token_ids[24 + index]]},
        runs_on=True,
    ),
    Row("stop", "stop strings inside an accepted path", GREEDY, _stop_string, runs_on=True),
    Row(
        "eos",
        "end-of-text, and ignore_eos",
        SEEDED,
        lambda index, *_: {"ignore_eos": index % 2 == 0, "logit_bias": {1: 12.0}},
        runs_on=True,
    ),
    Row("n", "n above 1", SEEDED, always(n=3)),
    Row("logprobs", "logprobs: values and ranks", SEEDED, always(logprobs=5)),
    Row("prompt_logprobs", "prompt_logprobs", GREEDY, always(prompt_logprobs=3)),
    Row(
        "all_logprobs",
        "logprobs of the whole vocabulary",
        {**GREEDY, "max_tokens": 20},
        always(logprobs=-1),
    ),
    Row(
        "logprob_token_ids",
        "logprobs of given token ids",
        GREEDY,
        always(logprobs=2, logprob_token_ids=[5, 7]),
        outcome="falls back",
        note="such requests draft nothing",
    ),
    Row("one_token", "max_tokens of 1", GREEDY, always(max_tokens=1)),
    Row(
        "first_token_stops",
        "a stop at the first token",
        GREEDY,
        lambda index, base, _: {"stop_token_ids": [base.token_ids[0]]},
        runs_on=True,
    ),
    Row(
        "json_schema",
        "structured output: JSON schema",
        SEEDED,
        structured(json=SCHEMA),
        first=True,
        note="such requests draft a chain",
    ),
    Row("regex", "structured output: regex", GREEDY, structured(regex="[a-z]{40}"), first=True),
    Row(
        "choice",
        "structured output: choice",
        GREEDY,
        structured(choice=["yes", "no", "a rather long answer that says neither yes nor no"]),
        first=True,
    ),
    Row("grammar", "structured output: grammar", SEEDED, structured(grammar=GRAMMAR), first=True),
    Row(
        "second_turn",
        "a second turn, from prefix-cache blocks that trees have written",
        second_turn=True,
    ),
    Row("mixed", "all of these in one batch", GREEDY, _mixed, first=True),
)

REASONING: tuple[Row, ...] = (
    Row(
        "after_reasoning",
        "structured output after reasoning",
        SEEDED,
        _after_reasoning(structured(regex="[a-z]{25}")),
        first=True,
        shows=_ends_reasoning,
    ),
    Row(
        "thinking_budget",
        "a thinking budget",
        SEEDED,
        _thinking_budget,
        outcome="falls back",
        shows=_is_forced,
    ),
    Row("reasoning", "these beside requests without them", GREEDY, _reasoning, first=True),
)
"""Asked of a target that reasons between two tokens of its own."""

BY_NAME = {row.name: row for row in (*ROWS, *REASONING)}
