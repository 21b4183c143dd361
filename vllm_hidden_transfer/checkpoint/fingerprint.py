# SPDX-License-Identifier: Apache-2.0
"""A fingerprint of a target's weights that does not depend on the dtype they are stored in.

Transfer maps fit one target. A model of the same shape with other weights would run, and draft
badly without anybody noticing, so a checkpoint names the weights that it was trained for.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_hidden_transfer.checkpoint.config import one_sentence

VERSION = "bf16-samples-1"
_ROWS = 8
_ELEMENTS = 64


class FingerprintError(Exception):
    """The folder has no weights that can be fingerprinted; the message is one sentence."""

    def __init__(self, message: str) -> None:
        super().__init__(one_sentence(message))


def fingerprint_target(folder: str | Path) -> str:
    """Fingerprint of the safetensors weights in a Hugging Face folder, sharded or not.

    Of every tensor, in the order of names, up to 8 rows spread from the first to the last are
    sampled, 64 elements of each, rounded to bf16 (to nearest even) and hashed with name and shape.
    So fp32 and bf16 copies of bf16 weights agree, a fine-tune that moves a matrix differs, and only
    a few kilobytes of every tensor are read.

    Raises:
        FingerprintError: there are no safetensors files, or one cannot be read.
    """
    root = Path(folder)
    samples: dict[str, tuple[list[int], bytes]] = {}
    for path in _weight_files(root):
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dict
                    if not name.endswith("rotary_emb.inv_freq"):  # a buffer of old checkpoints
                        samples[name] = _sample(file.get_slice(name))
        # RuntimeError: torch cannot lay out every dtype that safetensors knows (4-bit floats).
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise FingerprintError(f"{path} cannot be read as safetensors ({error}).") from error
    if not samples:
        raise FingerprintError(f"{root} has safetensors files without tensors.")
    # Tied heads are stored once or twice, depending on who saved them.
    embeddings = [samples[name] for name in samples if name.endswith("embed_tokens.weight")]
    for head in [name for name in samples if name.endswith("lm_head.weight")]:
        if samples[head] in embeddings:
            del samples[head]
    digest = hashlib.sha256()
    for name in sorted(samples):
        shape, data = samples[name]
        digest.update(f"{name} {shape}\n".encode())
        digest.update(data)
    return f"{VERSION}:{digest.hexdigest()}"


def _weight_files(root: Path) -> list[Path]:
    index = root / "model.safetensors.index.json"
    single = root / "model.safetensors"
    try:
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [root / name for name in sorted(set(names))]
        files = [single] if single.is_file() else sorted(root.glob("*.safetensors"))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FingerprintError(f"{index} is not a valid safetensors index.") from error
    except OSError as error:
        raise FingerprintError(f"{root} cannot be read ({error.strerror}).") from error
    if not files:
        raise FingerprintError(
            f"{root} has no safetensors files, so its weights cannot be fingerprinted."
        )
    return files


def _sample(stored: object) -> tuple[list[int], bytes]:
    """Shape and sampled elements of one stored tensor (a safetensors slice)."""
    shape = list(stored.get_shape())  # type: ignore[attr-defined]
    if not shape or 0 in shape:
        return shape, b""
    # A vector counts as one row; of more dimensions the first one indexes rows.
    length = shape[0]
    if len(shape) == 1:
        starts = _spread(max(length - _ELEMENTS, 0) + 1)
        rows = [stored[start : start + _ELEMENTS] for start in starts]  # type: ignore[index]
    else:
        rows = [stored[row : row + 1].flatten() for row in _spread(length)]  # type: ignore[index]
        # Move along the columns from row to row, so that no column block is always left out.
        offsets = _spread(max(rows[0].numel() - _ELEMENTS, 0) + 1)
        rows = [row[offsets[i % len(offsets)] :][:_ELEMENTS] for i, row in enumerate(rows)]
    sampled = torch.cat(rows)
    if sampled.is_floating_point():
        sampled = sampled.float().to(torch.bfloat16)
    return shape, sampled.contiguous().view(torch.uint8).numpy().tobytes()


def _spread(length: int) -> list[int]:
    """Up to `_ROWS` distinct indices from 0 to length - 1, evenly spread, ends included."""
    if length <= _ROWS:
        return list(range(length))
    return [round(i * (length - 1) / (_ROWS - 1)) for i in range(_ROWS)]
