# SPDX-License-Identifier: Apache-2.0
"""A target's own files: the checkpoint in its folder, and whether its weights are those that a checkpoint is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_hidden_transfer.asking import ConfigurationError
from vllm_hidden_transfer.names import METHOD

if TYPE_CHECKING:
    from vllm_hidden_transfer.checkpoint.config import TransferConfig

WEIGHTS = ["*.safetensors", "*.bin"]
"""What vLLM's default loader looks for, in its order; only the first can be fingerprinted."""
FETCHED_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")
"""Values of --load-format with which vLLM fetches the safetensors of a hub id."""


@dataclass(frozen=True)
class Target:
    """A target as vLLM's engine arguments name it."""

    model: str
    """A folder, or the id of a repository on a hub."""
    revision: str | None = None
    download_dir: str | None = None
    """Where vLLM keeps weights of a hub id; None for the hub's own cache."""
    ignore_patterns: str | list[str] | None = None
    """Files that vLLM does not fetch."""
    load_format: str = "auto"


def own_checkpoint(target: Target) -> Path:
    """The folder ``hidden_transfer`` in a target's own folder.

    Raises:
        ConfigurationError: there is none.
    """
    looked = [folder / METHOD for folder in _local_folders(target)]
    for folder in looked:
        if folder.is_dir():
            return folder
    where = (
        f"looked for {', '.join(map(str, looked))}" if looked else "which is not on this machine"
    )
    raise ConfigurationError(
        f"there is no transfer checkpoint in the target's folder ({where}): "
        'name one with --speculative-config \'{"method": "hidden_transfer", "model": "FOLDER"}\', or draft without one '
        'with "sources": ["recycling", "lookup"].'
    )


def mismatch(config: TransferConfig, folder: Path, target: Target) -> str | None:
    """What says that a checkpoint is for another target of the same shape; None where nothing does.

    The weights of a hub id are fetched if they are not there yet: they are the ones that vLLM is about to load.

    Args:
        config: the checkpoint's configuration.
        folder: where it is, for the message.
    """
    from vllm_hidden_transfer.checkpoint.fingerprint import FingerprintError, fingerprint_target

    try:
        found = fingerprint_target(_weights(target))
    except (FingerprintError, ConfigurationError) as error:
        return f"the weights of {target.model} cannot be compared with the transfer checkpoint ({error})"
    if found == config.target.fingerprint:
        return None
    return f"the transfer checkpoint {folder} was trained for other weights than those of {target.model}"


def _local_folders(target: Target) -> Iterator[Path]:
    """Where files of the target are on this machine. vLLM keeps weights and the rest in different caches if told to."""
    if Path(target.model).is_dir():
        yield Path(target.model)
        return
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for cache in dict.fromkeys((target.download_dir, None)):
        try:
            found = snapshot_download(
                target.model, revision=target.revision, cache_dir=cache, local_files_only=True
            )
        except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
            continue
        yield Path(found)


def _weights(target: Target) -> Path:
    """The folder that vLLM will load the weights from."""
    if Path(target.model).is_dir():
        return Path(target.model)
    if target.load_format not in FETCHED_FORMATS:
        raise ConfigurationError(f"--load-format {target.load_format} loads other files")
    from vllm.model_executor.model_loader.weight_utils import (
        download_weights_from_hf,
        maybe_download_from_modelscope,
    )

    try:
        found = maybe_download_from_modelscope(target.model, target.revision)
        return Path(
            found
            or download_weights_from_hf(
                target.model,
                target.download_dir,
                list(WEIGHTS),
                target.revision,
                ignore_patterns=target.ignore_patterns,
            )
        )
    except (
        Exception
    ) as error:  # of two hubs, their transports and caches; vLLM meets it again and says all of it
        raise ConfigurationError(f"they could not be fetched: {error}") from error
