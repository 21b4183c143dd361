# SPDX-License-Identifier: Apache-2.0
"""The draft vocabulary: a list of the tokens that the target really uses, and each request's own ones off that list.

Drafts are only proposals, so a draft pass need not read the whole LM head (FR-Spec, arXiv 2502.14856). What a list
lacks of one text (a name, a word of another language) mostly stood in that text before. Plain numpy, no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_hidden_transfer.checkpoint.config import TransferConfig
from vllm_hidden_transfer.checkpoint.vocabulary import load_vocabulary
from vllm_hidden_transfer.tree import NO_TOKEN

OWN_TOKENS = 256
"""A request's own tokens at most: they cost a row of the LM head each, which lies scattered. English chats have about
ten; this is for other languages, whose texts come back to what is recent."""

_RECENT = 4096
"""The last tokens of a request, in which its own are looked for, anew at every step: 0.1 ms. What was kept from step to
step would have to follow ended, resumed and edited requests, and a scan of a whole long context takes long."""


def most_used(answers: Iterable[Sequence[int]], size: int, vocabulary: int) -> NDArray[np.int32]:
    """The tokens that stand most often in some answers.

    Of tokens that are as frequent, never seen ones above all, those with smaller ids are taken: BPE merges are in the
    order of frequency.

    Args:
        answers: token ids of each answer; an end token counts as any other.
        size: how many to take, at most `vocabulary`.
        vocabulary: number of token ids.

    Returns:
        int32 [size], ascending.
    """
    tokens = np.fromiter(chain.from_iterable(answers), dtype=np.int64)
    counts = np.bincount(tokens, minlength=vocabulary)
    ranked = np.argsort(-counts, kind="stable")
    return np.sort(ranked[:size]).astype(np.int32)


class DraftVocabulary:
    """Which tokens each request's drafts are taken from.

    Args:
        listed: int32 [n], ascending and distinct.
        vocabulary: number of token ids.
    """

    def __init__(self, listed: NDArray[np.int32], vocabulary: int) -> None:
        self.listed = listed
        self._off_list = np.ones(vocabulary, dtype=np.bool_)
        self._off_list[listed] = False

    @classmethod
    def of(cls, checkpoint: str | Path, config: TransferConfig) -> DraftVocabulary | None:
        """That of a checkpoint; None where it drafts from all tokens.

        Raises:
            CheckpointError: its list is damaged or does not fit.
        """
        listed = load_vocabulary(checkpoint, config)
        return None if listed is None else cls(listed, config.target.vocab_size)

    def columns(self, token_ids: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
        """Which token each column of the draft logits is.

        Args:
            token_ids: the tokens so far of each of b requests.

        Returns:
            int64 [b, n + m]: the list, and the request's own tokens, `NO_TOKEN` behind them where others have more.
        """
        # Together they are at most as many as the list, so that a large batch does not read more than it saves.
        limit = min(OWN_TOKENS, len(self.listed) // max(len(token_ids), 1))
        own = [self._own(tokens, limit) for tokens in token_ids]
        width = max(map(len, own), default=0)
        columns = np.full((len(own), len(self.listed) + width), NO_TOKEN, dtype=np.int64)
        columns[:, : len(self.listed)] = self.listed
        for row, tokens in zip(columns[:, len(self.listed) :], own, strict=True):
            row[: len(tokens)] = tokens
        return columns

    def _own(self, tokens: NDArray[np.int32], limit: int) -> list[int]:
        """The distinct tokens off the list, most recent first."""
        recent = tokens[-_RECENT:]
        off_list = recent[self._off_list[recent]]
        return list(dict.fromkeys(off_list[::-1].tolist()))[:limit]
