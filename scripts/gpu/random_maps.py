# SPDX-License-Identifier: Apache-2.0
"""Transfer maps with random weights for a shape that has no weights of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common  # noqa: F401  finds the project

STEPS = 4
"""Transfer steps, as many as the demo target's."""


def write_random_maps(folder: Path, shape: Mapping[str, Any]) -> None:
    """Maps near the identity, with noise."""
    import torch

    from vllm_hidden_transfer.checkpoint import config as form
    from vllm_hidden_transfer.checkpoint.maps import TransferMaps, save_checkpoint

    size, layers, steps = shape["hidden_size"], shape["num_hidden_layers"], STEPS
    torch.manual_seed(7)
    maps = TransferMaps(steps, size, "token", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in maps.parameters():
            noise = torch.randn(steps, size, size, dtype=torch.bfloat16)
            parameter.copy_(torch.eye(size) + 0.3 * size**-0.5 * noise)
    verifier = form.Verifier(name_or_path="random", architectures=shape["architectures"])
    about = form.TransferConfig(
        speculators_config=form.SpeculatorsConfig(verifier=verifier),
        num_transfer_steps=steps,
        transfer_layer_ids=(layers * 3 // 4,),
        conditioning="token",
        calibration=form.Calibration(temperatures=(1.0,) * steps),
        target=form.Target(
            hidden_size=size,
            num_hidden_layers=layers,
            vocab_size=shape["vocab_size"],
            fingerprint="none",
        ),
    )
    save_checkpoint(folder, about, maps)
