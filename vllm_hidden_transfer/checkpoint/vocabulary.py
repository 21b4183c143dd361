# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's draft vocabulary: the tokens that the target really uses, in a small file beside the maps.

A draft pass that reads only their rows of the LM head is cheaper (FR-Spec, arXiv 2502.14856). A checkpoint without the
file drafts from all tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vllm_hidden_transfer.checkpoint.config import TransferConfig
from vllm_hidden_transfer.checkpoint.maps import CheckpointError, write_atomically

VOCABULARY_FILE = "vocabulary.safetensors"
_NAME = "ids"


def save_vocabulary(folder: Path, ids: NDArray[np.int32]) -> None:
    """Write the list of a checkpoint, all or nothing.

    Args:
        folder: the checkpoint's.
        ids: int32 [n], ascending and distinct.

    Raises:
        OSError: the file cannot be written.
    """
    data = save({_NAME: torch.from_numpy(ids)}, metadata={"format": "pt"})
    write_atomically(folder / VOCABULARY_FILE, data)


def load_vocabulary(folder: str | Path, config: TransferConfig) -> NDArray[np.int32] | None:
    """The list int32 [n] of the checkpoint in `folder`, ascending and distinct; None where it has none.

    Raises:
        CheckpointError: the file is damaged or does not fit the checkpoint.
    """
    path = Path(folder) / VOCABULARY_FILE
    if not path.exists():
        return None
    if config.conditioning == "chained":
        raise CheckpointError(f"{path}: chained maps draft from all tokens, remove the list.")
    try:
        with safe_open(str(path), framework="pt") as file:
            found = sorted(file.keys())
            if found != [_NAME]:
                raise CheckpointError(f"{path} holds the tensors {found}, not ['{_NAME}'] alone.")
            # What it says of itself first: a wrong file is refused before its data is read.
            stored = file.get_slice(_NAME)
            shape, dtype = list(stored.get_shape()), stored.get_dtype()
            size = config.target.vocab_size
            if dtype != "I32" or len(shape) != 1 or not 1 <= shape[0] <= size:
                raise CheckpointError(
                    f"{path}: {_NAME} is {dtype} of shape {shape}, not a list of 1 to {size} token ids in I32."
                )
            ids: NDArray[np.int32] = file.get_tensor(_NAME).numpy()
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or no safetensors file ({reason}).") from error
    if ids[0] < 0 or ids[-1] >= size or (np.diff(ids.astype(np.int64)) <= 0).any():
        raise CheckpointError(
            f"{path}: {_NAME} must be ascending and distinct token ids from 0 to {size - 1}."
        )
    return ids
