# SPDX-License-Identifier: Apache-2.0
"""A target small enough for Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.v2 import VOCABULARY


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 3 layers with a small vocabulary."""
    from tests.support.models import random_model

    folder = tmp_path_factory.mktemp("v2") / "tiny-llama"
    return random_model(folder, layers=3, vocabulary=VOCABULARY)
