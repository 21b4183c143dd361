# SPDX-License-Identifier: Apache-2.0
"""The transfer maps and their checkpoint folder, hostile folders included."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_hidden_transfer.checkpoint.config import Conditioning, TransferConfig
from vllm_hidden_transfer.checkpoint.maps import (
    CheckpointError,
    TransferMaps,
    load_checkpoint,
    save_checkpoint,
)

STEPS, SIZE = 3, 8


def make_config(conditioning: Conditioning = "token", **changes: Any) -> TransferConfig:
    values: dict[str, Any] = {
        "speculators_config": {
            "verifier": {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]}
        },
        "num_transfer_steps": STEPS,
        "transfer_layer_ids": [2],
        "conditioning": conditioning,
        "calibration": {"temperatures": [1.0, 1.1, 1.2]},
        "target": {
            "hidden_size": SIZE,
            "num_hidden_layers": 4,
            "vocab_size": 16,
            "fingerprint": "bf16-samples-1:00",
        },
    }
    return TransferConfig.model_validate(values | changes)


def make_maps(conditioning: Conditioning = "token") -> TransferMaps:
    torch.manual_seed(0)
    maps = TransferMaps(STEPS, SIZE, conditioning)
    for parameter in maps.parameters():
        torch.nn.init.normal_(parameter)
    return maps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "maps", make_config(), make_maps())
    return tmp_path / "maps"


def test_forward_is_w_h_plus_u_emb() -> None:
    maps = make_maps()
    hidden, embedding = torch.randn(5, SIZE), torch.randn(5, SIZE)
    assert maps.token_weight is not None
    expected = torch.stack(
        [hidden @ maps.weight[i].T + embedding @ maps.token_weight[i].T for i in range(STEPS)],
        dim=1,
    )
    torch.testing.assert_close(maps(hidden, embedding), expected)


def test_published_maps_ignore_the_token() -> None:
    maps = make_maps("none")
    hidden = torch.randn(5, SIZE)
    torch.testing.assert_close(maps(hidden), maps(hidden, torch.randn(5, SIZE)))
    assert maps(hidden).shape == (5, STEPS, SIZE)


def test_conditioned_maps_need_the_token() -> None:
    with pytest.raises(ValueError, match="sampled token"):
        make_maps()(torch.randn(5, SIZE))


@pytest.mark.parametrize("conditioning", ["token", "none"])
def test_round_trip(tmp_path: Path, conditioning: Conditioning) -> None:
    config, maps = make_config(conditioning), make_maps(conditioning)
    save_checkpoint(tmp_path, config, maps)
    loaded_config, loaded = load_checkpoint(tmp_path)
    assert loaded_config == config
    assert loaded.conditioning == conditioning
    assert loaded.weight.dtype == torch.bfloat16
    assert not loaded.weight.requires_grad
    torch.testing.assert_close(loaded.weight, maps.weight.detach().bfloat16(), rtol=0, atol=0)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors"}


def test_save_refuses_maps_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="conditioning"):
        save_checkpoint(tmp_path, make_config("none"), make_maps("token"))
    maps = make_maps()
    with torch.no_grad():
        maps.weight[0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        save_checkpoint(tmp_path, make_config(), maps)
    assert not list(tmp_path.iterdir())


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return apply


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return apply


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["token_weight"][1, 2, 3] = float("inf")


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "config not json": (write("config.json", b"{"), "not valid JSON"),
    "config not utf-8": (write("config.json", b"\xff\xfe\x00"), "not valid JSON"),
    "config nested deeply": (write("config.json", b"[" * 100_000), "not valid JSON"),
    "config huge": (write("config.json", b" " * (2 << 20)), "over 1 MiB"),
    "config a list": (write("config.json", b"[]"), "speculators_model_type"),
    "another type": (edit_config(speculators_model_type="medusa"), "speculators_model_type"),
    "newer format": (edit_config(format_version=2), "format_version 2"),
    "misspelt key": (edit_config(num_steps=3), "num_steps"),
    "no such layer": (edit_config(transfer_layer_ids=[4]), "layers 0 to 3"),
    "temperatures missing": (edit_config(calibration={"temperatures": [1.0]}), "1 entries for 3"),
    "temperature zero": (edit_config(calibration={"temperatures": [0, 1, 1]}), "greater than 0"),
    "other conditioning": (edit_config(conditioning="none"), "holds the tensors"),
    "other width": (
        edit_config(
            target={
                "hidden_size": 16,
                "num_hidden_layers": 4,
                "vocab_size": 16,
                "fingerprint": "x",
            }
        ),
        "shape",
    ),
    "missing tensor": (edit_weights(lambda t: t.__delitem__("token_weight")), "holds the tensors"),
    "extra tensor": (
        edit_weights(lambda t: t.update(extra=torch.zeros(1))),
        "holds the tensors",
    ),
    "wrong shape": (edit_weights(lambda t: t.update(weight=torch.zeros(3, 8, 7))), "shape"),
    "integers": (
        edit_weights(lambda t: t.update(weight=torch.zeros(3, 8, 8, dtype=torch.int64))),
        "not as floats",
    ),
    "mixed dtypes": (edit_weights(lambda t: t.update(weight=torch.zeros(3, 8, 8))), "dtypes"),
    "infinity": (edit_weights(poison), "NaN or infinity"),
    "empty file": (write("model.safetensors", b""), "damaged"),
    "a pickle": (write("model.safetensors", b"\x80\x04K\x01."), "damaged"),
    "huge header": (write("model.safetensors", struct.pack("<Q", 1 << 62)), "damaged"),
    "header garbage": (write("model.safetensors", struct.pack("<Q", 4) + b"{{{{"), "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders_are_refused_in_one_sentence(folder: Path, name: str) -> None:
    spoil, message = HOSTILE[name]
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert text.endswith(".")


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(folder)


def test_a_file_or_nothing_in_place_of_the_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        load_checkpoint(folder / "config.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_checkpoint(folder)
