# SPDX-License-Identifier: Apache-2.0
"""The draft vocabulary: the list, its file, each request's own tokens, and candidates of fewer logits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.unit.test_distributions import TEMPERATURES, bigram_setting
from tests.unit.test_transfer import make_config
from vllm_hidden_transfer.checkpoint.maps import CheckpointError
from vllm_hidden_transfer.checkpoint.vocabulary import (
    VOCABULARY_FILE,
    load_vocabulary,
    save_vocabulary,
)
from vllm_hidden_transfer.drafting.distributions import candidates
from vllm_hidden_transfer.drafting.vocabulary import (
    OWN_TOKENS,
    DraftVocabulary,
    most_used,
)
from vllm_hidden_transfer.tree import NO_TOKEN

CONFIG = make_config()
"""Of a target with 16 tokens."""
token_lists = st.lists(st.integers(0, 15), max_size=40)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


@given(st.lists(token_lists, max_size=4), st.integers(1, 16))
def test_the_most_used_tokens_are_listed(answers: list[list[int]], size: int) -> None:
    counts = Counter(token for answer in answers for token in answer)
    best = sorted(range(16), key=lambda token: (-counts[token], token))[:size]
    found = most_used(answers, size, 16)
    assert found.dtype == np.int32
    assert found.tolist() == sorted(best)


@given(st.sets(st.integers(0, 15), min_size=1))
def test_what_is_saved_is_loaded(tmp_path_factory: Any, tokens: set[int]) -> None:
    folder = tmp_path_factory.mktemp("maps")
    save_vocabulary(folder, ids(*sorted(tokens)))
    found = load_vocabulary(folder, CONFIG)
    assert found is not None
    assert found.tolist() == sorted(tokens)


def test_a_checkpoint_without_a_list_has_none(tmp_path: Path) -> None:
    assert load_vocabulary(tmp_path, CONFIG) is None
    assert DraftVocabulary.of(tmp_path, CONFIG) is None


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"ids": torch.tensor([3, 5])}, "is I64 of shape"),
        ({"ids": torch.tensor([3.0, 5.0])}, "is F32 of shape"),
        ({"ids": torch.tensor([[3, 5]], dtype=torch.int32)}, "of shape [1, 2]"),
        ({"ids": torch.zeros(0, dtype=torch.int32)}, "of shape [0]"),
        ({"ids": torch.arange(17, dtype=torch.int32)}, "not a list of 1 to 16 token ids"),
        ({"ids": torch.tensor([3, 16], dtype=torch.int32)}, "token ids from 0 to 15"),
        ({"ids": torch.tensor([-1, 3], dtype=torch.int32)}, "token ids from 0 to 15"),
        ({"ids": torch.tensor([3, 3], dtype=torch.int32)}, "ascending and distinct"),
        ({"ids": torch.tensor([5, 3], dtype=torch.int32)}, "ascending and distinct"),
        ({"other": torch.tensor([3], dtype=torch.int32)}, "holds the tensors ['other']"),
        (None, "is damaged or no safetensors file"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor] | None, words: str
) -> None:
    path = tmp_path / VOCABULARY_FILE
    if tensors is None:
        path.write_bytes(b"not one")
    else:
        save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        load_vocabulary(tmp_path, CONFIG)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_chained_maps_have_no_list(tmp_path: Path) -> None:
    save_vocabulary(tmp_path, ids(1, 2))
    with pytest.raises(CheckpointError, match="chained maps draft from all tokens"):
        load_vocabulary(tmp_path, make_config("chained"))


@given(
    st.sets(st.integers(0, 15), min_size=8),
    st.lists(token_lists.filter(bool), min_size=1, max_size=4),
)
def test_columns_are_the_list_and_each_requests_own(
    listed: set[int], texts: list[list[int]]
) -> None:
    columns = DraftVocabulary(ids(*sorted(listed)), 16).columns([ids(*text) for text in texts])
    limit = len(listed) // len(texts)
    own = []
    for text in texts:
        recent_first = dict.fromkeys(token for token in reversed(text) if token not in listed)
        own.append(list(recent_first)[:limit])
    width = max(map(len, own))
    expected = [[*sorted(listed), *tokens, *[NO_TOKEN] * (width - len(tokens))] for tokens in own]
    assert columns.tolist() == expected


def test_own_tokens_are_the_most_recent_ones() -> None:
    vocabulary = DraftVocabulary(np.arange(1000, dtype=np.int32), 3000)
    text = np.arange(1000, 2000, dtype=np.int32)
    (columns,) = vocabulary.columns([text])
    assert columns[1000:].tolist() == list(range(1999, 1999 - OWN_TOKENS, -1))
    for listed_since, own in ((4095, [2000]), (4096, [])):
        (columns,) = vocabulary.columns([ids(2000, *[5] * listed_since)])
        assert columns[1000:].tolist() == own


def test_no_tokens_of_another_request_and_none_of_before() -> None:
    """Every call is about its own texts: a name that was used before says nothing."""
    vocabulary = DraftVocabulary(ids(*range(8)), 16)
    assert vocabulary.columns([ids(9, 1), ids(10)])[:, 8:].tolist() == [[9], [10]]
    assert vocabulary.columns([ids(1, 2, 3)])[:, 8:].tolist() == [[]]


def test_candidates_of_some_columns_are_those_of_masked_logits() -> None:
    """Tokens behind columns, with the bigram tables of all tokens, against all logits with -inf where no column is."""
    states, _, head, _, tables = bigram_setting(200)
    logits = states @ head.T
    columns = torch.from_numpy(
        DraftVocabulary(np.arange(3, 200, 2, dtype=np.int32), 200).columns(
            [ids(4, 8, 8, 5), ids(10)]
        )
    )
    assert columns[:, -2:].tolist() == [[8, 4], [10, NO_TOKEN]]
    chosen = logits.gather(2, columns.clamp(min=0)[:, None].expand(-1, len(TEMPERATURES), -1))
    chosen.masked_fill_(columns[:, None] < 0, -torch.inf)
    masked = torch.full_like(logits, -torch.inf)
    for row, tokens in enumerate(columns):
        masked[row][:, tokens[tokens >= 0]] = logits[row][:, tokens[tokens >= 0]]
    scale = torch.tensor(TEMPERATURES)
    for bigram in (None, tables):
        found = candidates(chosen, scale, 16, bigram, columns)
        expected = candidates(masked, scale, 16, bigram)
        assert found.tokens.tolist() == expected.tokens.tolist()
        for depth in range(len(TEMPERATURES)):
            before = found.tokens[:, max(depth - 1, 0)]
            scores = (each.after(depth, before) for each in (found, expected))
            torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)
