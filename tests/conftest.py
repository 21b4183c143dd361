# SPDX-License-Identifier: Apache-2.0
"""Settings that every test needs before vLLM is imported, and the targets that tests share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["VLLM_HIDDEN_TRANSFER_TEST_DRAFTS"] = "1"

import pytest

pytest.register_assert_rewrite("tests.support.engines")


def pytest_configure(config: pytest.Config) -> None:
    """What becomes of every case of the feature matrix is recorded, in any run of the tests."""
    from tests.matrix.record import FOLDER, Recorder

    config.pluginmanager.register(Recorder(FOLDER))


@pytest.fixture(scope="session")
def random_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 8-layer Llama, standard deviation 0.12, untied."""
    from tests.support.models import random_model

    return random_model(tmp_path_factory.mktemp("target") / "random-llama")


@pytest.fixture(scope="session")
def demo_target() -> Path:
    """The demo target's folder; ``make target`` makes it."""
    folder = Path(__file__).parents[1] / "examples" / "smollm2-135m"
    assert (folder / "model.safetensors").exists(), "run `make target` first"
    return folder
