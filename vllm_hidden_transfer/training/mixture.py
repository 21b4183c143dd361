# SPDX-License-Identifier: Apache-2.0
"""How much of what is taught the target wrote itself."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.rows import DataError


def mix(own: Sequence[Example], other: Sequence[Example], share: float, seed: int) -> list[Example]:
    """Examples of both, so that `own` has `share` (0 to 1) of the taught tokens; in the given order, own first.

    One side is kept whole and of the other a part is drawn, as near to the share as whole examples allow.

    Raises:
        DataError: the share is out of range, or a side that must have a part is empty.
    """
    if not 0 <= share <= 1:
        raise DataError(f"the share of the target's own answers is {share}, but must be 0 to 1.")
    if share > 0 and not own:
        raise DataError(
            f"the target's own answers shall be {share:.0%} of what is taught and there are none: "
            "write some with `vllm-hidden-transfer generate` or set the share to 0."
        )
    if share < 1 and not other:
        raise DataError(
            f"the target's own answers shall be {share:.0%} of what is taught and there is "
            "nothing else: add other data or set the share to 1."
        )
    if share in (0, 1):
        return list(own if share else other)
    own_tokens, other_tokens = _taught(own), _taught(other)
    if own_tokens * (1 - share) > other_tokens * share:
        own = _draw(own, other_tokens * share / (1 - share), seed)
    else:
        other = _draw(other, own_tokens * (1 - share) / share, seed)
    return [*own, *other]


def _taught(examples: Iterable[Example]) -> int:
    return sum(len(example.answer) for example in examples)


def _draw(examples: Sequence[Example], tokens: float, seed: int) -> list[Example]:
    """Some of the examples, in their order, that teach about so many tokens."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    chosen, missing = [], tokens
    for index in order:
        length = len(examples[index].answer)
        if length < 2 * missing:  # nearer with it than without it
            chosen.append(index)
            missing -= length
    return [examples[index] for index in sorted(chosen)]
