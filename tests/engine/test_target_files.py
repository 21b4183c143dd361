# SPDX-License-Identifier: Apache-2.0
"""A target named by a hub id: the checkpoint beside it and its weights, by revision and download folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import random_checkpoint
from tests.support.hub import hub, into_cache
from vllm_hidden_transfer.asking import ConfigurationError
from vllm_hidden_transfer.checkpoint.maps import load_checkpoint
from vllm_hidden_transfer.engine import target_files
from vllm_hidden_transfer.engine.target_files import Target

pytestmark = pytest.mark.engine

ID = "somebody/random-llama"


@pytest.fixture(scope="module")
def tuned(random_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random target after a fine-tune."""
    folder = shutil.copytree(random_target, tmp_path_factory.mktemp("tuned") / "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor + 0.1 for name, tensor in tensors.items()}
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def maps(random_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for the random target."""
    folder = tmp_path_factory.mktemp("maps") / "maps"
    random_checkpoint(folder, random_target)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache in the default place."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def mismatch(maps: Path, target: Target) -> str | None:
    return target_files.mismatch(load_checkpoint(maps)[0], maps, target)


def test_the_revision_decides(cache: Path, random_target: Path, tuned: Path, maps: Path) -> None:
    into_cache(cache, ID, "main", tuned)
    into_cache(cache, ID, "v1", random_target)
    assert mismatch(maps, Target(ID, revision="v1")) is None
    assert "other weights" in str(mismatch(maps, Target(ID)))
    assert "cannot be compared" in str(mismatch(maps, Target(ID, revision="v2")))


def test_the_download_folder_decides(
    cache: Path, tmp_path: Path, random_target: Path, tuned: Path, maps: Path
) -> None:
    into_cache(cache, ID, "main", tuned)
    into_cache(tmp_path / "own", ID, "main", random_target)
    assert mismatch(maps, Target(ID, download_dir=str(tmp_path / "own"))) is None
    assert "other weights" in str(mismatch(maps, Target(ID)))


def test_the_checkpoint_beside_a_revision(
    cache: Path, tmp_path: Path, random_target: Path, maps: Path
) -> None:
    snapshot = into_cache(cache, ID, "v1", random_target)
    shutil.copytree(maps, snapshot / "hidden_transfer")
    assert target_files.own_checkpoint(Target(ID, revision="v1")) == snapshot / "hidden_transfer"
    # Weights in a folder of their own: what else the repository has is in the cache.
    into_cache(tmp_path / "own", ID, "v1", random_target)
    apart = Target(ID, revision="v1", download_dir=str(tmp_path / "own"))
    assert target_files.own_checkpoint(apart) == snapshot / "hidden_transfer"
    with pytest.raises(ConfigurationError, match="which is not on this machine"):
        target_files.own_checkpoint(Target(ID))


def test_an_unknown_hub_id_names_the_way_out(cache: Path) -> None:
    with pytest.raises(ConfigurationError, match="--speculative-config"):
        target_files.own_checkpoint(Target("nobody/no-such-model"))


def test_other_formats_are_not_fetched(cache: Path, maps: Path) -> None:
    said = mismatch(maps, Target(ID, load_format="dummy"))
    assert "--load-format dummy loads other files" in str(said)


FIRST_START = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
model, maps, revision = sys.argv[1:4]
def configure(**more):
    args = EngineArgs(
        model=model, revision=revision, skip_tokenizer_init=True, dtype="float32",
        speculative_config={"method": "hidden_transfer", "model": maps}, **more
    )
    return args.create_engine_config()
try:
    settings = configure().additional_config["hidden_transfer"]
    print("CONFIGURED", json.dumps(settings))
except ValueError as error:
    print("REFUSED", error)
"""


@pytest.mark.parametrize("revision", ["v1", "tuned"])
def test_the_first_start_of_a_hub_id(
    revision: str, random_target: Path, tuned: Path, maps: Path, tmp_path: Path
) -> None:
    """Nothing is on this machine yet: the weights are fetched once, and compared before they are loaded."""
    with hub(ID, {"v1": random_target, "tuned": tuned}) as (address, fetched):
        done = subprocess.run(
            [sys.executable, "-c", FIRST_START, ID, str(maps), revision],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": address,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1",
            },
        )
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    assert fetched.count("model.safetensors") == 1
    if revision == "tuned":
        assert last.startswith("REFUSED")
        assert "other weights" in last
        return
    assert last.startswith("CONFIGURED"), done.stdout + done.stderr[-3000:]
    settings = json.loads(last.removeprefix("CONFIGURED"))
    assert (settings["checkpoint"], settings["mismatch"]) == (str(maps), None)
