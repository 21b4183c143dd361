# SPDX-License-Identifier: Apache-2.0
"""The target's fingerprint: the weights matter, the way they are stored does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_hidden_transfer.checkpoint.fingerprint import FingerprintError, fingerprint_target

Weights = dict[str, torch.Tensor]


@pytest.fixture
def weights() -> Weights:
    torch.manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (100, 24),
        "model.layers.0.mlp.up_proj.weight": (300, 200),
        "model.norm.weight": (200,),
        "scalar": (),
    }
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def write(folder: Path, weights: Weights) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    return folder


def test_stored_dtype_does_not_matter(tmp_path: Path, weights: Weights) -> None:
    stored = fingerprint_target(write(tmp_path / "bf16", weights))
    wide = {name: tensor.float() for name, tensor in weights.items()}
    assert fingerprint_target(write(tmp_path / "fp32", wide)) == stored
    double = {name: tensor.double() for name, tensor in weights.items()}
    assert fingerprint_target(write(tmp_path / "fp64", double)) == stored


def test_shards_do_not_matter(tmp_path: Path, weights: Weights) -> None:
    stored = fingerprint_target(write(tmp_path / "one", weights))
    folder = tmp_path / "many"
    folder.mkdir()
    names = list(weights)
    index = {}
    for number, name in enumerate(names):
        file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        save_file({name: weights[name]}, folder / file)
        index[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert fingerprint_target(folder) == stored


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("end", [0, -1])
def test_a_changed_sampled_element_changes_it(
    tmp_path: Path, weights: Weights, name: str, end: int
) -> None:
    before = fingerprint_target(write(tmp_path / "before", weights))
    weights[name].view(-1)[end] += 1.0
    assert fingerprint_target(write(tmp_path / "after", weights)) != before


def test_a_small_update_of_a_matrix_changes_it(tmp_path: Path, weights: Weights) -> None:
    before = fingerprint_target(write(tmp_path / "before", weights))
    name = "model.layers.0.mlp.up_proj.weight"
    update = torch.randn(300, 1) @ torch.randn(1, 200) * 1e-2  # rank one, like a merged LoRA
    weights[name] = (weights[name].float() + update).bfloat16()
    assert fingerprint_target(write(tmp_path / "after", weights)) != before


def test_names_and_shapes_matter(tmp_path: Path, weights: Weights) -> None:
    before = fingerprint_target(write(tmp_path / "before", weights))
    renamed = {f"{name}.x": tensor for name, tensor in weights.items()}
    assert fingerprint_target(write(tmp_path / "renamed", renamed)) != before
    weights["model.norm.weight"] = weights["model.norm.weight"].view(1, 200)
    assert fingerprint_target(write(tmp_path / "shaped", weights)) != before


@pytest.mark.parametrize("within", ["", "language_model."])
def test_a_tied_head_may_be_stored_twice(tmp_path: Path, weights: Weights, within: str) -> None:
    weights = {f"{within}{name}": tensor for name, tensor in weights.items()}
    once = fingerprint_target(write(tmp_path / "once", weights))
    weights[f"{within}lm_head.weight"] = weights[f"{within}model.embed_tokens.weight"].clone()
    assert fingerprint_target(write(tmp_path / "twice", weights)) == once


def test_a_fingerprint_stays_what_it_was(tmp_path: Path) -> None:
    """Checkpoints name it: another rule would refuse every one that was made before."""
    names = ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")
    values = {name: torch.arange(64.0 * (1 + (name == names[2]))) for name in names}
    weights = {name: tensor.view(8, -1).bfloat16() for name, tensor in values.items()}
    assert fingerprint_target(write(tmp_path / "target", weights)) == (
        "bf16-samples-1:943cd9171489192090fb8a2fe9769c39f2a21981c10a7038a89ae48f7f0b551a"
    )


def test_folders_without_weights_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FingerprintError, match="no safetensors"):
        fingerprint_target(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FingerprintError, match="cannot be read"):
        fingerprint_target(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(FingerprintError, match="index"):
        fingerprint_target(tmp_path)
