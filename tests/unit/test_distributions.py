# SPDX-License-Identifier: Apache-2.0
"""From draft logits to calibrated candidates."""

import numpy as np
import pytest
import torch

from vllm_hidden_transfer.drafting.distributions import top_candidates
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
