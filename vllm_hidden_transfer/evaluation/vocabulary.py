# SPDX-License-Identifier: Apache-2.0
"""The command `vocabulary`: which tokens a target uses, counted in recorded answers, as a checkpoint's list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from vllm_hidden_transfer.checkpoint.maps import CheckpointError, load_checkpoint
from vllm_hidden_transfer.checkpoint.vocabulary import VOCABULARY_FILE, save_vocabulary
from vllm_hidden_transfer.drafting.vocabulary import most_used
from vllm_hidden_transfer.evaluation.preparation import JudgingError, read_answers, target_config
from vllm_hidden_transfer.offline.rows import DataError


def write_vocabulary(
    target: Path, checkpoint: Path, data: Sequence[Path], size: int, console: Console
) -> None:
    """Count the tokens of the answers and write the `size` most used ones into the checkpoint's folder.

    Raises:
        JudgingError: something is missing, damaged, or does not fit.
    """
    try:
        config, _ = load_checkpoint(checkpoint)
        if config.conditioning == "chained":
            raise JudgingError(
                f"The maps in {checkpoint} are chained: those draft from all tokens."
            )
        vocabulary = config.target.vocab_size
        found = target_config(target).vocab_size
        if found != vocabulary:
            raise JudgingError(
                f"The checkpoint {checkpoint} is for a target with a vocabulary of {vocabulary}, but {target} has "
                f"{found}: name its own target."
            )
        if size > vocabulary:
            raise JudgingError(f"--size is {size}, but the target has {vocabulary} tokens in all.")
        corpus = read_answers(target, data, vocabulary)
        for reason, count in corpus.left_out.items():
            console.print(f"{count} left out: {reason}")
        answers = [example.answer for example in corpus.examples]
        ids = most_used(answers, size, vocabulary)
        save_vocabulary(checkpoint, ids)
    except (CheckpointError, DataError, OSError, ValueError) as error:
        raise JudgingError(error) from error
    tokens = np.concatenate([np.array(answer, dtype=np.int64) for answer in answers])
    console.print(
        f"written to {checkpoint / VOCABULARY_FILE}: {len(np.unique(tokens))} tokens occur in {len(answers)} answers, "
        f"the {size} on the list are {np.isin(tokens, ids).mean():.1%} of their text",
        soft_wrap=True,
    )
