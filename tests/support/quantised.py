# SPDX-License-Identifier: Apache-2.0
"""A random Llama whose linear layers are int8, in the format of compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.models import random_model

_SCHEME = {
    "targets": ["Linear"],
    "weights": {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
    },
    "input_activations": {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    },
}


def quantised_llama(folder: Path) -> Path:
    """Save it to ``folder``, made once: weights int8 by output channel, activations int8 by token."""
    if (folder / "config.json").is_file():
        return folder
    plain = random_model(folder.with_name(folder.name + "-plain"))
    tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        scale = tensor.float().abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (tensor.float() / scale).round().to(torch.int8)
        tensors[name.replace("weight", "weight_scale")] = scale
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    about = json.loads((plain / "config.json").read_text())
    about["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": _SCHEME},
    }
    (folder / "config.json").write_text(json.dumps(about))
    return folder
