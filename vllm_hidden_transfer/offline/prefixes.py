# SPDX-License-Identifier: Apache-2.0
"""What the frozen target says about every token of the corpus: keys, values, states, next-token distributions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_hidden_transfer.offline.target import FrozenTarget, SharedPrefixes

if TYPE_CHECKING:
    from vllm_hidden_transfer.offline.cache import Example

TEACHER_WIDTH = 64
"""Most probable tokens kept of the target's own distribution; they hold 99% of it or more."""

_CHUNK = 128


class Prefixes(ABC):
    """The arrays "hidden", "keys", "values", "teacher_ids" and "teacher_probs" of every example.

    They are stored as fp16 (ids as int32), whatever the target computes in.
    """

    def __init__(self, target: FrozenTarget) -> None:
        heads = (target.num_upper_layers, target.num_kv_heads, target.head_dim)
        width = min(TEACHER_WIDTH, target.vocab_size)
        self._widths: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
            "hidden": (np.float16, (target.hidden_size,)),
            "keys": (np.float16, heads),
            "values": (np.float16, heads),
            "teacher_ids": (np.int32, (width,)),
            "teacher_probs": (np.float16, (width,)),
        }

    @abstractmethod
    def read(self, name: str, example: Example, dtype: torch.dtype = torch.float32) -> Tensor:
        """One example's part [n, ...] of an array, as a tensor of `dtype`."""

    def likely_tokens(self, examples: Sequence[Example]) -> Tensor:
        """Token ids (ascending) that the loss must weigh exactly: here those of the answers."""
        return torch.unique(torch.tensor([token for e in examples for token in e.answer]))

    def prefixes(self, examples: Sequence[Example]) -> SharedPrefixes:
        """The upper layers' keys and values of some examples, padded to the longest."""
        length = max(len(example.tokens) for example in examples)
        parts = []
        for name in ("keys", "values"):
            layers, heads, dim = self._widths[name][1]
            part = torch.zeros(len(examples), layers, length, heads, dim)
            for row, example in enumerate(examples):
                part[row, :, : len(example.tokens)] = self.read(name, example).transpose(0, 1)
            parts.append(part)
        return SharedPrefixes(*parts)

    def _compute(self, target: FrozenTarget, example: Example) -> dict[str, NDArray[np.generic]]:
        """Run the target over one example.

        Raises:
            ValueError: a hidden state, key or value does not fit into fp16.
        """
        prefix = target.prefix(torch.tensor(example.tokens))
        # Only positions from the last prompt token on are ever taught.
        ids, probs = self._teacher(target, prefix.final, len(example.prompt) - 1)
        tensors = {
            "hidden": prefix.hidden.float(),
            "keys": prefix.keys.transpose(0, 1).float(),
            "values": prefix.values.transpose(0, 1).float(),
            "teacher_ids": ids,
            "teacher_probs": probs,
        }
        arrays = {
            name: tensor.cpu().contiguous().numpy().astype(self._widths[name][0])
            for name, tensor in tensors.items()
        }
        for name in ("hidden", "keys", "values"):
            if not np.isfinite(arrays[name]).all():
                raise ValueError(f"{name} of {example.id} do not fit into fp16")
        return arrays

    def _teacher(self, target: FrozenTarget, final: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Most probable tokens [n, width] and their probabilities; zero before `start`."""
        shape = (len(final), *self._widths["teacher_ids"][1])
        ids, probs = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
        for first in range(start, len(final), _CHUNK):
            part = slice(first, first + _CHUNK)
            logits = (final[part] @ target.head_weight.T).float()
            top, top_ids = logits.topk(shape[1], dim=-1)
            ids[part] = top_ids.int().cpu()
            probs[part] = (top - logits.logsumexp(-1, keepdim=True)).exp().cpu()
        return ids, probs


class PrefixPasses(Prefixes):
    """Prefixes computed whenever they are wanted, the last few kept: no disk, but a prefix pass at every step."""

    def __init__(self, target: FrozenTarget, kept: int) -> None:
        super().__init__(target)
        self._target, self._kept = target, kept
        self._recent: OrderedDict[str, dict[str, NDArray[np.generic]]] = OrderedDict()

    def read(self, name: str, example: Example, dtype: torch.dtype = torch.float32) -> Tensor:
        if example.digest not in self._recent:
            self._recent[example.digest] = self._compute(self._target, example)
            if len(self._recent) > self._kept:
                self._recent.popitem(last=False)
        return torch.from_numpy(self._recent[example.digest][name]).to(dtype)
