# SPDX-License-Identifier: Apache-2.0
"""From draft logits to calibrated candidates."""

import numpy as np
import pytest
import torch

from vllm_hidden_transfer.checkpoint.maps import BigramMaps
from vllm_hidden_transfer.drafting.bigram import BigramTables
from vllm_hidden_transfer.drafting.distributions import BIGRAM_WIDTH, top_candidates
from vllm_hidden_transfer.tree import most_probable_paths


def test_candidates_are_the_calibrated_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 50)
    temperatures = [0.7, 1.9]
    tokens, scores = top_candidates(logits, temperatures, 6)
    for depth, temperature in enumerate(temperatures):
        expected = (logits[:, depth].double() / temperature).log_softmax(-1)
        best = expected.topk(6)
        assert tokens[:, depth].tolist() == best.indices.tolist()
        assert scores[:, depth] == pytest.approx(best.values.numpy(), abs=1e-5)


def test_width_is_cut_to_the_vocabulary() -> None:
    tokens, scores = top_candidates(torch.zeros(1, 1, 4), [1.0], 99)
    assert sorted(tokens.ravel().tolist()) == [0, 1, 2, 3]
    assert np.exp(scores).sum() == pytest.approx(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_distribution_gives_no_nodes(bad: float) -> None:
    logits = torch.zeros(1, 2, 8)
    logits[0, 1, 3] = bad
    tokens, scores = top_candidates(logits, [1.0, 1.0], 4)
    (tree,) = most_probable_paths(tokens, scores, 16)
    assert len(tree) == 4
    assert tree.max_depth == 1


SIZE, STEPS = 16, 4
TEMPERATURES = [0.7, 1.3, 1.0, 1.9]


def bigram_setting(
    vocabulary: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BigramMaps, BigramTables]:
    """Final states of two requests, embeddings, an LM head, and maps with their tables."""
    torch.manual_seed(1)
    states = 0.2 * torch.randn(2, STEPS, SIZE)
    embeddings, head = torch.randn(vocabulary, SIZE), torch.randn(vocabulary, SIZE)
    maps = BigramMaps(STEPS, SIZE, 3)
    torch.nn.init.normal_(maps.down, std=0.3)
    torch.nn.init.normal_(maps.up, std=0.3)
    tables = BigramTables.of(
        maps,
        vocabulary,
        embeddings.__getitem__,
        lambda ids: torch.nn.functional.embedding(ids, head),
    )
    return states, embeddings, head, maps, tables


def after(
    states: torch.Tensor, embeddings: torch.Tensor, head: torch.Tensor, maps: BigramMaps, token: int
) -> torch.Tensor:
    """log p [2, k - 1, vocabulary] of the depths 2..k after a token, by the LM head on states that moved."""
    moved = states[:, 1:] + maps(embeddings[token].expand(2, STEPS - 1, SIZE))
    scale = torch.tensor(TEMPERATURES[1:])[:, None]
    return (moved @ head.T / scale).log_softmax(-1).detach()


def test_bigrams_are_exact_where_every_token_is_a_candidate() -> None:
    states, embeddings, head, maps, tables = bigram_setting(40)
    logits = states @ head.T
    tokens, scores = top_candidates(logits, TEMPERATURES, 8, tables)
    assert scores.shape == (2, STEPS, 40, 40)
    first = (logits[:, 0] / TEMPERATURES[0]).log_softmax(-1).sort(descending=True).values
    assert scores[:, 0, 7] == pytest.approx(first.numpy(), abs=1e-5)
    for request in range(2):
        for depth in range(1, STEPS):
            for place, before in enumerate(tokens[request, depth - 1].tolist()):
                exact = after(states, embeddings, head, maps, before)[request, depth - 1]
                found = scores[request, depth, place]
                assert found == pytest.approx(exact[tokens[request, depth]].numpy(), abs=1e-4)


def test_bigrams_leave_tokens_that_are_no_candidates_what_they_had() -> None:
    states, _, head, _, tables = bigram_setting(500)
    logits = states @ head.T
    _, scores = top_candidates(logits, TEMPERATURES, 8, tables)
    assert scores.shape == (2, STEPS, BIGRAM_WIDTH, BIGRAM_WIDTH)
    kept = np.exp(scores).sum(-1)
    assert (kept < 1).all()
    # Odds of a candidate against all that is left out change by its own gain alone.
    tokens, marginal = top_candidates(logits, TEMPERATURES, BIGRAM_WIDTH)
    left_out = 1 - np.exp(marginal).sum(-1)
    gain = (
        scores[:, 1:]
        - np.log(1 - kept[:, 1:])[..., None]
        - (marginal[:, 1:] - np.log(left_out[:, 1:, None]))[:, :, None]
    )
    before, following = torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:])
    place = torch.arange(STEPS - 1)[:, None]
    expected = tables.before[before, place] @ tables.after[following, place].mT
    expected = expected / torch.tensor(TEMPERATURES[1:])[:, None, None]
    assert gain == pytest.approx(expected.numpy(), abs=0.05)


def test_a_broken_depth_gives_no_nodes_with_bigrams() -> None:
    states, _, head, _, tables = bigram_setting(40)
    logits = states @ head.T
    logits[0, 2, 3] = float("nan")
    tokens, scores = top_candidates(logits, TEMPERATURES, 8, tables)
    broken, whole = most_probable_paths(tokens, scores, 64)
    assert broken.max_depth == 2
    assert whole.max_depth > 2
    assert np.isnan(scores[..., 0]).reshape(2, STEPS, -1).any(-1).tolist() == [
        [False, False, True, False],
        [False] * 4,
    ]
