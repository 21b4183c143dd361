# SPDX-License-Identifier: Apache-2.0
"""The closed-form start: least squares from the root's state to the next positions' states.

On the study's targets this start was worth more than the gradient steps after it (47% against 21%
first-step accuracy with an identity start).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_hidden_transfer.checkpoint.config import Conditioning
from vllm_hidden_transfer.checkpoint.maps import TransferMaps
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import Prefixes
from vllm_hidden_transfer.offline.target import FrozenTarget

_COLUMNS = 512
"""Columns or rows of the statistics that are worked on at once."""


@dataclass
class Moments:
    """Second moments of m inputs and their products with n outputs, summed over roots.

    Memory is m (m + n) numbers, whatever the number of tokens. The inputs' own moments are fp64, because they are
    inverted; the products stay fp32.
    """

    inputs: Tensor
    """fp64 [m, m]."""
    cross: Tensor
    """fp32 [m, n]."""
    count: int = 0

    @classmethod
    def zeros(cls, num_inputs: int, num_outputs: int) -> Moments:
        """Nothing seen yet."""
        inputs = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
        return cls(inputs, torch.zeros(num_inputs, num_outputs))

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add roots: inputs [roots, m], outputs [roots, n]."""
        products = (inputs.T @ inputs).split(_COLUMNS)
        # Some rows at a time: torch makes an fp64 copy of what is added.
        for sums, more in zip(self.inputs.split(_COLUMNS), products, strict=True):
            sums.add_(more)
        self.cross.addmm_(inputs.T, outputs)
        self.count += len(inputs)

    def solve(self, strength: float) -> Tensor:
        """Weights [n, m] with the least squared error plus ``strength`` times the squared weights; consumes this.

        Inputs are brought to unit mean square first: a state's features differ by orders of magnitude,
        embeddings are smaller still, and one penalty has to fit all of them.
        """
        if self.count == 0:
            raise ValueError("no roots to fit on: the corpus is empty or its answers are too short")
        gram = self.inputs
        scale = (gram.diagonal() / self.count).clamp_min(1e-12).rsqrt()
        gram.mul_(scale[:, None]).mul_(scale).div_(self.count)
        gram.diagonal().add_(strength)
        torch.linalg.cholesky(gram, out=gram)
        # A few columns at a time, each in the place of what it was made from: fp64 copies of all of them, or room for
        # the solution beside the products, would be the largest thing here.
        for start in range(0, self.cross.shape[1], _COLUMNS):
            products = self.cross[:, start : start + _COLUMNS]
            scaled = products.double().mul_((scale / self.count)[:, None])
            products.copy_(torch.cholesky_solve(scaled, gram).mul_(scale[:, None]))
            del scaled  # before the next one is made
        return self.cross.T


def ridge_maps(
    cache: Prefixes,
    target: FrozenTarget,
    examples: Sequence[Example],
    steps: int,
    conditioning: Conditioning,
    strength: float = 1e-3,
    on_example: Callable[[], None] = lambda: None,
) -> TransferMaps:
    """Maps fitted on every root of the examples' answers that has k successors.

    Chained maps see another token at every step, so their steps are fitted one after the other, each with a pass
    over the corpus of its own; all steps of the others share one.

    Args:
        cache: holds the examples.
        target: the frozen target.
        examples: what to fit on.
        steps: number of transfer steps k.
        conditioning: what the maps see.
        strength: ridge penalty, for inputs of unit mean square.
        on_example: called after each example (``ridge_passes`` times for each).
    """
    size = target.hidden_size
    maps = TransferMaps(steps, size, conditioning)
    groups = (
        [[step] for step in range(steps)] if conditioning == "chained" else [list(range(steps))]
    )
    for group in groups:
        num_inputs = size if conditioning == "none" else 2 * size
        moments = Moments.zeros(num_inputs, len(group) * size)
        for inputs, outputs in _roots(cache, target, examples, steps, conditioning, group):
            moments.add(inputs, outputs)
            on_example()
        solution = moments.solve(strength).unflatten(0, (len(group), size))
        with torch.no_grad():
            maps.weight[group] = solution[..., :size]
            if maps.token_weight is not None:
                maps.token_weight[group] = solution[..., size:]
    return maps


def ridge_passes(steps: int, conditioning: Conditioning) -> int:
    """Passes over the corpus that `ridge_maps` takes."""
    return steps if conditioning == "chained" else 1


def _roots(
    cache: Prefixes,
    target: FrozenTarget,
    examples: Iterable[Example],
    steps: int,
    conditioning: Conditioning,
    group: list[int],
) -> Iterable[tuple[Tensor, Tensor]]:
    """Inputs [roots, d or 2 d] and outputs [roots, steps of the group x d] of each example."""
    for example in examples:
        states = cache.read("hidden", example)
        tokens = torch.tensor(example.tokens)
        roots = torch.arange(max(len(example.prompt) - 1, 1), len(tokens) - steps)
        offsets = torch.tensor(group) + 1
        inputs = [states[roots]]
        if conditioning != "none":
            token = offsets[0] if conditioning == "chained" else 1
            inputs.append(target.embed(tokens[roots + token]).float().cpu())
        yield torch.cat(inputs, dim=-1), states[roots[:, None] + offsets].flatten(1)
