# SPDX-License-Identifier: Apache-2.0
"""The residual stream around the target's last layer at every token: what Medusa and EAGLE draft from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_hidden_transfer.evaluation.drafts import on_device
from vllm_hidden_transfer.offline.cache import Example, PrefixCache
from vllm_hidden_transfer.offline.prefixes import Prefixes
from vllm_hidden_transfer.offline.target import FrozenTarget

_POSITIONS_AT_ONCE = 256


class FinalStates(PrefixCache):
    """Append-only fp16 arrays "before" and "after", [n, d] of each example: what enters and what leaves the last
    layer, before the last norm.

    They are derived from the prefixes: true hidden states that run through the upper layers as rows of one step
    come out as the target's own final states.
    """

    _ARRAYS = ("before", "after")  # type: ignore[assignment]  # the base class has five

    def __init__(
        self, folder: str | Path, target: FrozenTarget, prefixes: Prefixes, fingerprint: str
    ) -> None:
        self._prefixes = prefixes
        super().__init__(folder, target, fingerprint)

    def _read_index(self) -> None:
        # The first thing that the base class does with its arrays: here they are others.
        self._widths = dict.fromkeys(self._ARRAYS, self._widths["hidden"])
        super()._read_index()

    @torch.no_grad()
    def _compute(self, target: FrozenTarget, example: Example) -> dict[str, NDArray[np.generic]]:
        hidden = self._prefixes.read("hidden", example).to(target.device)
        shared = on_device(self._prefixes.prefixes([example]), target.device)
        with _inputs_caught(target) as caught:
            for places in torch.arange(len(hidden), device=target.device).split(_POSITIONS_AT_ONCE):
                # The root of a row is the position before it; position 0 sees itself alone.
                target.run_rows(hidden[places][None, :, None], places[None] - 1, shared)
        arrays: dict[str, NDArray[np.generic]] = {
            name: torch.cat(parts).float().cpu().numpy().astype(np.float16)
            for name, parts in caught.items()
        }
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError(f"final states of {example.id} do not fit into fp16")
        return arrays


@contextmanager
def _inputs_caught(target: FrozenTarget) -> Iterator[dict[str, list[Tensor]]]:
    """What enters the last layer and what enters the last norm, for as long as this lasts."""
    inner = target.model.model
    caught: dict[str, list[Tensor]] = {"before": [], "after": []}

    def catch(parts: list[Tensor]) -> Any:
        return lambda module, inputs: parts.append(inputs[0][0])

    hooks = [
        inner.layers[-1].register_forward_pre_hook(catch(caught["before"])),
        inner.norm.register_forward_pre_hook(catch(caught["after"])),
    ]
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()
