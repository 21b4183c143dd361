# SPDX-License-Identifier: Apache-2.0
"""The corpus and its prefix cache: what the frozen target says about every token, kept on disk.

The target never changes, so its keys, values, hidden states and next-token distributions are
computed once for the whole corpus. About 10 KB a token for the demo target (fp16), memory mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_hidden_transfer.checkpoint.maps import write_atomically
from vllm_hidden_transfer.offline.prefixes import Prefixes
from vllm_hidden_transfer.offline.target import FrozenTarget

TURN = "@turn-"
"""In an example's id: between the name of a conversation and the number of the turn that is taught."""


@dataclass(frozen=True)
class Example:
    """One sequence of the corpus; positions from `start` on are to be learnt."""

    id: str
    kind: str
    temperature: float | None
    """At which the target wrote the answer, 0 = greedily; None: somebody else wrote it."""
    prompt: list[int]
    answer: list[int]
    kept_out: bool | None = field(default=None, compare=False, repr=False)
    """Whether what it was cut from is held out; None: it was cut from nothing, and itself decides."""

    @property
    def held_out(self) -> bool:
        """Whether it is for calibration and judging only.

        All answers to a prompt stay together, and the turns of a conversation, each of which contains the ones before.
        """
        if self.kept_out is not None:
            return self.kept_out
        # One token for the beginning is no prompt: it is the same everywhere.
        return is_held_out(self.prompt if len(self.prompt) > 1 else self.tokens)

    @property
    def record(self) -> dict[str, Any]:
        """What a file of answers says about it."""
        names = ("id", "kind", "temperature", "prompt", "answer")
        return {name: getattr(self, name) for name in names}

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt + self.answer

    @property
    def digest(self) -> str:
        """Short hash of the token ids."""
        return hashlib.sha256(json.dumps([self.prompt, self.answer]).encode()).hexdigest()[:16]


def read_examples(path: str | Path, min_answer: int = 8, max_tokens: int = 768) -> list[Example]:
    """Examples of a JSONL file, in its order; too short or too long ones are left out."""
    examples = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # a line still being written is not there yet
                example = Example(**json.loads(line))
                if len(example.answer) >= min_answer and len(example.tokens) <= max_tokens:
                    examples.append(example)
    return examples


def is_held_out(tokens: Sequence[int], one_in: int = 20) -> bool:
    """Whether what begins with these tokens is for calibration and judging only: the content decides, and nothing else.

    No name has a say, so that renaming or copying a data file moves nothing between training and judging.
    """
    return hashlib.sha256(json.dumps(list(tokens)).encode()).digest()[0] % one_in == 0


class PrefixCache(Prefixes):
    """Append-only arrays over all tokens of the corpus, one after another, and their offsets.

    Raises:
        ValueError: the folder holds prefixes of another target, transfer layer or dtype, which are left as they are.
    """

    _ARRAYS = ("hidden", "keys", "values", "teacher_ids", "teacher_probs")

    def __init__(self, folder: str | Path, target: FrozenTarget, fingerprint: str) -> None:
        super().__init__(target)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {
            "fingerprint": fingerprint,
            "layer": target.transfer_layer,
            "dtype": str(target.dtype).removeprefix("torch."),
            "version": 2,
        }
        marker = self.folder / "about.json"
        if not marker.exists():
            for name in (*self._ARRAYS, "index"):  # nobody knows of what they are
                (self.folder / name).unlink(missing_ok=True)
            write_atomically(marker, json.dumps(about).encode())
        elif json.loads(marker.read_text()) != about:
            raise ValueError(
                f"the prefix cache {self.folder} is of another target, transfer layer or dtype: name another folder "
                "(train's --work, eval's --cache) or remove it"
            )
        self.digests: dict[str, int] = {}
        self.offsets: list[int] = [0]
        self._read_index()
        self._open()

    def fill(self, target: FrozenTarget, examples: Iterable[Example]) -> Iterator[Example]:
        """Run the target over the examples that are missing; yields each one that is done."""
        files = {name: (self.folder / name).open("ab") for name in self._ARRAYS}
        try:
            with (self.folder / "index").open("a") as index:
                for example in examples:
                    if example.digest in self.digests:
                        continue
                    arrays = self._compute(target, example)
                    for name, file in files.items():
                        file.write(arrays[name].tobytes())
                        file.flush()
                    index.write(f"{example.digest} {len(example.tokens)}\n")
                    index.flush()
                    self._add(example.digest, len(example.tokens))
                    yield example
        finally:
            for file in files.values():
                file.close()
            self._open()

    def likely_tokens(self, examples: Sequence[Example], width: int = 8) -> Tensor:
        """Token ids (ascending) among the target's `width` most probable at any taught position."""
        seen = [
            np.unique(
                self.read("teacher_ids", example, torch.int64)[len(example.prompt) - 1 :, :width]
            )
            for example in examples
        ]
        return torch.from_numpy(np.unique(np.concatenate(seen)))

    def span(self, example: Example) -> slice:
        """Where the example's tokens lie in the arrays."""
        number = self.digests[example.digest]
        return slice(self.offsets[number], self.offsets[number + 1])

    def read(self, name: str, example: Example, dtype: torch.dtype = torch.float32) -> Tensor:
        """One example's part [n, ...] of an array, as a tensor of `dtype`."""
        return torch.from_numpy(np.array(self._maps[name][self.span(example)])).to(dtype)

    def _add(self, digest: str, length: int) -> None:
        self.digests[digest] = len(self.offsets) - 1
        self.offsets.append(self.offsets[-1] + length)

    def _read_index(self) -> None:
        """Read the index and cut every array to it: a killed run may have written too far."""
        index = self.folder / "index"
        index.touch()
        text = index.read_text()
        kept = text[: text.rfind("\n") + 1]
        for line in kept.splitlines():
            digest, length = line.split()
            self._add(digest, int(length))
        if kept != text:
            index.write_text(kept)
        for name in self._ARRAYS:
            path = self.folder / name
            path.touch()
            size = self.offsets[-1] * self._row_bytes(name)
            if path.stat().st_size != size:
                os.truncate(path, size)

    def _row_bytes(self, name: str) -> int:
        dtype, shape = self._widths[name]
        return np.dtype(dtype).itemsize * int(np.prod(shape))

    def _open(self) -> None:
        self._maps: dict[str, NDArray[np.generic]] = {}
        for name, (dtype, shape) in self._widths.items():
            full = (self.offsets[-1], *shape)
            self._maps[name] = (
                np.memmap(self.folder / name, dtype=dtype, mode="r", shape=full)
                if self.offsets[-1]
                else np.zeros(full, dtype=dtype)
            )
