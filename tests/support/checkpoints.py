# SPDX-License-Identifier: Apache-2.0
"""Transfer checkpoints with random maps, for targets that nothing was trained for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_hidden_transfer.checkpoint.config import (
    Calibration,
    Conditioning,
    SpeculatorsConfig,
    Target,
    TransferConfig,
    Tree,
    Verifier,
)
from vllm_hidden_transfer.checkpoint.fingerprint import fingerprint_target
from vllm_hidden_transfer.checkpoint.maps import TransferMaps, save_checkpoint


def random_checkpoint(
    folder: Path,
    target: Path,
    *,
    steps: int = 4,
    layer: int = 5,
    conditioning: Conditioning = "token",
    bigram_rank: int = 0,
    budget: int = 8,
    temperatures: Sequence[float] | None = None,
) -> Path:
    """Save maps near the identity, with noise, that name ``target`` as theirs."""
    shape = json.loads((target / "config.json").read_text())
    size = shape["hidden_size"]
    torch.manual_seed(7)
    maps = TransferMaps(steps, size, conditioning, bigram_rank=bigram_rank)
    with torch.no_grad():
        for name, parameter in maps.named_parameters():
            if name.startswith("bigram"):
                parameter.normal_()
                continue
            parameter.copy_(torch.eye(size) + 0.3 * size**-0.5 * torch.randn(steps, size, size))
    config = TransferConfig(
        speculators_config=SpeculatorsConfig(
            verifier=Verifier(name_or_path=target.name, architectures=shape["architectures"])
        ),
        num_transfer_steps=steps,
        transfer_layer_ids=(layer,),
        conditioning=conditioning,
        bigram_rank=bigram_rank,
        calibration=Calibration(temperatures=tuple(temperatures or (1.0,) * steps)),
        tree=Tree(node_budget=budget),
        target=Target(
            hidden_size=size,
            num_hidden_layers=shape["num_hidden_layers"],
            vocab_size=shape["vocab_size"],
            fingerprint=fingerprint_target(target),
        ),
    )
    save_checkpoint(folder, config, maps)
    return folder
