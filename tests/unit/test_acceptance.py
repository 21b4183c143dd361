# SPDX-License-Identifier: Apache-2.0
"""Acceptance length, its interval, and repetition."""

import pytest

from vllm_hidden_transfer.evaluation.acceptance import acceptance, repeated_share


def test_length_is_summed_over_requests() -> None:
    found = acceptance([90, 10], [30, 10], [[1, 2, 3], [4]])
    assert found.length == pytest.approx(100 / 40)
    assert found.low <= found.length <= found.high
    assert found.requests == 2


def test_the_interval_narrows_with_requests() -> None:
    few = acceptance([20, 30, 40], [10, 10, 10], [[]] * 3)
    many = acceptance([20, 30, 40] * 30, [10, 10, 10] * 30, [[]] * 90)
    assert many.high - many.low < few.high - few.low


def test_repeated_four_grams() -> None:
    assert repeated_share([[1, 2, 3, 4, 5, 6]]) == 0
    # 1234 2341 3412 4123 1234: the last of five was there before.
    assert repeated_share([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert repeated_share([[1, 2]]) == 0
