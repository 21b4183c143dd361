# SPDX-License-Identifier: Apache-2.0
"""Commands of README and docs as they are printed, in a folder that has examples/ and nothing else of the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pages import PAGES, ROOT, Command, commands

pytestmark = pytest.mark.engine

COMMANDS = [command for page in PAGES for command in commands(page)]
SERVE_LINES = [each for each in COMMANDS if each.text.startswith("vllm serve ")]


@pytest.fixture
def folder(demo_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run; the maps of the page about training are the shipped ones."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    maps = tmp_path / "work" / "quick" / "maps"
    maps.parent.mkdir(parents=True)
    maps.symlink_to(ROOT / "examples" / "smollm2-135m" / "hidden_transfer")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", SERVE_LINES, ids=str)
def test_serve_lines(line: Command, folder: Path) -> None:
    """Read by vLLM's own parser and made into an engine's configuration. tests/engine/test_serve.py serves."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    _, _, model, *options = line.words
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", model, *options])
    config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config()
    settings = config.additional_config["hidden_transfer"]
    if "maps" in settings["sources"]:
        assert (folder / settings["checkpoint"] / "config.json").exists()
    assert settings["mismatch"] is None
    assert config.speculative_config.num_speculative_tokens == 16
    assert config.cache_config.kv_cache_memory_bytes == 1 << 30


def run(command: str, folder: Path) -> str:
    """What a command printed, as a shell with the virtual environment runs it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # The banner is an INFO line; the cache's size is the command's own.
    environment = {**os.environ, "PATH": path, "VLLM_LOGGING_LEVEL": "INFO"}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-4000:]
    return printed


def printed_on_a_page(beginning: str) -> str:
    (command,) = [each.text for each in COMMANDS if each.text.startswith(beginning)]
    return command


@pytest.mark.parametrize(
    ("beginning", "expected"),
    [
        ("vllm-hidden-transfer inspect ", "16 of 30"),
        pytest.param("vllm run-batch ", "hidden_transfer is on", marks=pytest.mark.matrix),
    ],
)
def test_as_printed(beginning: str, expected: str, folder: Path) -> None:
    assert expected in run(printed_on_a_page(beginning), folder)
    if "run-batch" in beginning:
        answers = [json.loads(line) for line in (folder / "answers.jsonl").open()]
        asked = (ROOT / "examples" / "batch.jsonl").read_text().splitlines()
        assert len(answers) == len(asked)
        assert all(answer["response"]["status_code"] == 200 for answer in answers)


@pytest.mark.matrix
def test_the_python_example(folder: Path) -> None:
    """Named in the README's prose; it prints what a pass gave."""
    printed = run("python examples/python_api.py", folder)
    assert "hidden_transfer is on" in printed
    length = float(printed.rpartition(" tokens a pass with drafts")[0].split()[-1])
    assert 1.5 < length <= 5
