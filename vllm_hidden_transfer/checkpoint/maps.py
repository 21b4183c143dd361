# SPDX-License-Identifier: Apache-2.0
"""The trained maps of hidden transfer, and the checkpoint folder that holds them.

Hidden transfer (arXiv 2404.12022, section 3.1) maps the hidden state that enters layer t at the
last processed token to pseudo hidden states of the next k positions, one linear map a step. Ours
may also see the token just sampled, which the target has not processed yet.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vllm_hidden_transfer.checkpoint.config import (
    FORMAT_VERSION,
    MODEL_TYPE,
    Conditioning,
    TransferConfig,
    one_sentence,
)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
STORED_DTYPE = torch.bfloat16
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_CONFIG_BYTES = 1 << 20


class CheckpointError(Exception):
    """A transfer checkpoint cannot be used; the message is one sentence for the user."""

    def __init__(self, message: str) -> None:
        super().__init__(one_sentence(message))


class BigramMaps(nn.Module):
    """Bigram re-weighting: what a drafted token says about the one drafted after it.

    One-pass drafts of depth i do not know which token is drafted at depth i - 1. Where that is a, the
    state f_i that the LM head reads moves to f_i + up_i down_i emb(a), i = 2..k, so the logit of b
    after a changes by the inner product of two vectors of r numbers, one of a and one of b.
    """

    def __init__(
        self, num_steps: int, hidden_size: int, rank: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(num_steps - 1, rank, hidden_size, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(num_steps - 1, hidden_size, rank, dtype=dtype))

    def forward(self, token_embedding: Tensor) -> Tensor:
        """What is added to the states [n, k - 1, d] of the depths 2..k, from the embeddings [n, k - 1, d] of the tokens
        at the depths before."""
        squeezed = torch.einsum("njd,jrd->njr", token_embedding, self.down)
        return torch.einsum("njr,jdr->njd", squeezed, self.up)


class TransferMaps(nn.Module):
    """Pseudo hidden state of step i = W_i h, or W_i h + U_i emb(x) when conditioned on a token.

    h is the residual stream entering layer t at the last processed position ("root"); x is the
    token at root + 1, which the target has just sampled; emb(x) is the target's input embedding
    row, unscaled. Chained maps see x_i at root + i instead: the sampled token first, then the tokens
    drafted on the way. Row i (counted from 1) stands at position root + i, enters layer t as its
    residual stream, and its logits predict the token at root + i + 1.
    """

    token_weight: nn.Parameter | None
    bigram: BigramMaps | None
    """Not used by `forward`: it acts on what comes out of the target's layers."""

    def __init__(
        self,
        num_steps: int,
        hidden_size: int,
        conditioning: Conditioning = "token",
        dtype: torch.dtype = torch.float32,
        bigram_rank: int = 0,
    ) -> None:
        super().__init__()
        self.conditioning: Conditioning = conditioning
        shape = (num_steps, hidden_size, hidden_size)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
        if conditioning != "none":
            self.token_weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
        else:
            self.register_parameter("token_weight", None)
        bigram = BigramMaps(num_steps, hidden_size, bigram_rank, dtype) if bigram_rank else None
        self.register_module("bigram", bigram)

    @property
    def num_steps(self) -> int:
        """Number of transfer steps k."""
        return self.weight.shape[0]

    @property
    def bigram_rank(self) -> int:
        """Rank r of the bigram re-weighting; 0 without one."""
        return 0 if self.bigram is None else self.bigram.down.shape[1]

    @property
    def hidden_size(self) -> int:
        """Width d of the target's residual stream."""
        return self.weight.shape[1]

    def forward(self, hidden: Tensor, token_embedding: Tensor | None = None) -> Tensor:
        """Pseudo hidden states [n, k, d] from hidden [n, d] and token_embedding [n, d].

        `token_embedding` is ignored by unconditioned maps and required by conditioned ones. Chained
        maps take [n, j, d], the tokens at root + 1 .. root + j, and give the first j <= k states.
        """
        steps, size = self.num_steps, self.hidden_size
        if self.conditioning == "chained":
            return self._chained(hidden, token_embedding)
        # One matrix product for all steps: [n, d] x [d, k d].
        pseudo = hidden @ self.weight.flatten(0, 1).T
        if self.token_weight is not None:
            if token_embedding is None:
                raise ValueError("token-conditioned maps need the embedding of the sampled token")
            pseudo = pseudo + token_embedding @ self.token_weight.flatten(0, 1).T
        return pseudo.unflatten(-1, (steps, size))

    def _chained(self, hidden: Tensor, token_embeddings: Tensor | None) -> Tensor:
        if token_embeddings is None or token_embeddings.dim() != 3 or self.token_weight is None:
            raise ValueError("chained maps need the embeddings [n, j, d] of the tokens on the path")
        count = token_embeddings.shape[1]
        pseudo = (hidden @ self.weight[:count].flatten(0, 1).T).unflatten(-1, (count, -1))
        return pseudo + torch.einsum("njd,jed->nje", token_embeddings, self.token_weight[:count])


def save_checkpoint(folder: str | Path, config: TransferConfig, maps: TransferMaps) -> None:
    """Write config.json and model.safetensors (bf16) into `folder`; each file all or nothing."""
    problem = _disagreement(config, maps)
    if problem:
        raise CheckpointError(f"not saved to {folder}: {problem}.")
    tensors = {
        name: tensor.detach().to("cpu", STORED_DTYPE).contiguous()
        for name, tensor in maps.named_parameters()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"not saved to {folder}: {name} holds NaN or infinity.")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
    write_atomically(path / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    write_atomically(path / CONFIG_FILE, text.encode())


def load_checkpoint(folder: str | Path) -> tuple[TransferConfig, TransferMaps]:
    """Read a checkpoint folder; the maps keep their stored dtype, on CPU, without gradients.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged or of another format.
    """
    path = Path(folder)
    try:
        if not path.is_dir():
            what = "is a file, not a checkpoint folder" if path.exists() else "does not exist"
            raise CheckpointError(f"the transfer checkpoint {path} {what}.")
        config = _read_config(path / CONFIG_FILE)
        return config, _read_maps(path / WEIGHTS_FILE, config)
    except OSError as error:
        raise CheckpointError(
            f"the transfer checkpoint {path} cannot be read ({error.strerror or error})."
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a temporary file, flushed to disk, then renamed.

    Raises:
        OSError: a full disk, for example; it names the file, and what stood there before is whole.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failing write does not say whose it was
        raise


def _disagreement(config: TransferConfig, maps: TransferMaps) -> str | None:
    if maps.conditioning != config.conditioning:
        return f"conditioning is {maps.conditioning!r}, config.json says {config.conditioning!r}"
    expected = _shapes(config)
    found = {name: list(tensor.shape) for name, tensor in maps.named_parameters()}
    if found.keys() != expected.keys():
        return f"the maps hold {sorted(found)}, config.json implies {sorted(expected)}"
    for name, shape in found.items():
        if shape != expected[name]:
            return f"{name} has shape {shape}, config.json implies {expected[name]}"
    return None


def _shapes(config: TransferConfig) -> dict[str, list[int]]:
    """Names and shapes of the tensors that config.json implies."""
    size, steps = config.target.hidden_size, config.num_transfer_steps
    shapes = {"weight": [steps, size, size]}
    if config.conditioning != "none":
        shapes["token_weight"] = [steps, size, size]
    if config.bigram_rank:
        shapes["bigram.down"] = [steps - 1, config.bigram_rank, size]
        shapes["bigram.up"] = [steps - 1, size, config.bigram_rank]
    return shapes


def _read_config(path: Path) -> TransferConfig:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is no transfer checkpoint: it has no {path.name}.")
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is no checkpoint configuration: it is over 1 MiB.")
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is not valid JSON ({reason}).") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    if not isinstance(data, dict) or data.get("speculators_model_type") != MODEL_TYPE:
        raise CheckpointError(f'{path} does not say "speculators_model_type": "{MODEL_TYPE}".')
    version = data.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:  # neither true nor 1.0
        raise CheckpointError(
            f"{path} has format_version {version!r}, "
            f"this version of the plugin reads {FORMAT_VERSION}."
        )
    try:
        # Strictly: a true or a "1" where a number belongs is a mistake, not a number.
        return TransferConfig.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise CheckpointError(f"{path} is not valid, {where}: {first['msg']}.") from error


def _read_maps(path: Path, config: TransferConfig) -> TransferMaps:
    if not path.is_file():
        raise CheckpointError(
            f"the transfer checkpoint {path.parent} is incomplete: it has no {path.name}."
        )
    expected = _shapes(config)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            found = sorted(file.keys())
            if found != sorted(expected):
                raise CheckpointError(
                    f"{path} holds the tensors {found}, its config.json implies {sorted(expected)}."
                )
            # Shapes first: a wrong file is refused before its data is read.
            for name, implied in expected.items():
                stored = file.get_slice(name)
                shape, dtype = list(stored.get_shape()), stored.get_dtype()
                if shape != implied:
                    raise CheckpointError(
                        f"{path}: {name} has shape {shape}, its config.json implies {implied}."
                    )
                if dtype not in _FLOAT_DTYPES:
                    raise CheckpointError(f"{path}: {name} is stored as {dtype}, not as floats.")
            for name in expected:
                tensors[name] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or no safetensors file ({reason}).") from error
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1:
        raise CheckpointError(f"{path}: its tensors have different dtypes.")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity.")
    with torch.device("meta"):
        maps = TransferMaps(
            config.num_transfer_steps,
            config.target.hidden_size,
            config.conditioning,
            bigram_rank=config.bigram_rank,
        )
    maps.load_state_dict(tensors, assign=True)
    return maps.requires_grad_(False)
