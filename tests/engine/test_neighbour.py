# SPDX-License-Identifier: Apache-2.0
"""Beside a vLLM that the plugin cannot run with: vLLM is as without the plugin, and our method is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import random_checkpoint
from tests.support.models import add_tokenizer, random_model
from tests.support.servers import SMALL, VLLM, serve

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
OTHERS = {
    "version": ({"OTHER_VLLM_VERSION": "0.33.0"}, "vLLM 0.32.x and not with 0.33.0"),
    "seam": (
        {"OTHER_VLLM_WITHOUT": "vllm.engine.arg_utils:EngineArgs.spec_tokens"},
        "vllm.engine.arg_utils.EngineArgs.spec_tokens is not there",
    ),
}
PROMPT = [5, 9, 200, 31, 77, 1000, 4, 18]
WARNING = "hidden_transfer is not available"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = add_tokenizer(random_model(tmp_path_factory.mktemp("target") / "llama"))
    random_checkpoint(folder / "hidden_transfer", folder)
    return folder


@pytest.fixture(scope="module")
def answer(target: Path) -> list[int]:
    """What the target says, by transformers in fp32."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


@pytest.fixture(params=OTHERS)
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Child processes meet another vLLM; what the plugin says about it."""
    variables, sentence = OTHERS[request.param]
    set_up(monkeypatch, variables)
    return sentence


def set_up(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    bed = str(ROOT / "tests" / "support" / "other_vllm")
    paths = [bed, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def run(*command: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


def complete(url: str, target: Path) -> list[int]:
    body = {
        "model": str(target),
        "prompt": PROMPT,
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        tokens: list[int] = json.load(reply)["choices"][0]["token_ids"]
    return tokens


# A server takes long to start; LLM and the command lines meet both kinds in every run.
SERVERS = pytest.mark.parametrize(
    "reason", ["version", pytest.param("seam", marks=pytest.mark.matrix)], indirect=True
)


@SERVERS
def test_a_server_without_our_method_answers(
    reason: str, target: Path, answer: list[int], tmp_path: Path
) -> None:
    log = tmp_path / "server.log"
    with serve(target, "--dtype", "float32", log=log) as url:
        assert complete(url, target) == answer
    warnings = [line for line in log.read_text().splitlines() if WARNING in line]
    assert len(warnings) == 1
    assert reason in warnings[0]
    assert "0.32.0" in warnings[0]


@SERVERS
def test_a_server_with_our_method_is_refused(reason: str, target: Path) -> None:
    options = json.dumps({"method": "hidden_transfer"})
    for way in (
        ["--speculative-model", "hidden_transfer"],
        ["--speculative-config", options],
    ):
        done = run(str(VLLM), "serve", str(target), *SMALL, "--dtype", "float32", *way)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("vllm serve: ")
        assert reason in last
        assert "install vLLM 0.32.0" in last


IN_PYTHON = """
import json, sys
from tests.support.engines import engine, generate
target, prompt = sys.argv[1], json.loads(sys.argv[2])
def main():
    with engine(target) as llm:
        print("ANSWER", json.dumps(generate(llm, [prompt], max_tokens=12).outputs[0]))
    checkpoint = f"{target}/hidden_transfer"
    for options in (
        {"speculative_config": {"method": "hidden_transfer"}},
        {"speculative_config": {"model": checkpoint}},
        {"spec_method": "hidden_transfer"},
        {"spec_model": checkpoint},
    ):
        try:
            with engine(target, **options):
                print("REFUSED not")
        except ValueError as error:
            print("REFUSED", error)
if __name__ == "__main__":
    main()
"""


def in_python(target: Path, script: str = IN_PYTHON) -> tuple[list[int], list[str], str]:
    """The answer without our method, what each way of asking for it was told, and the log."""
    done = run(sys.executable, "-c", script, str(target), json.dumps(PROMPT))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    (answer,) = [line for line in lines if line.startswith("ANSWER")]
    refused = [line.removeprefix("REFUSED ") for line in lines if line.startswith("REFUSED")]
    return json.loads(answer.removeprefix("ANSWER")), refused, done.stdout + done.stderr


def test_python(reason: str, target: Path, answer: list[int]) -> None:
    found, refused, log = in_python(target)
    assert found == answer
    assert len(refused) == 4
    for sentence in refused:
        assert reason in sentence
        assert "install vLLM 0.32.0" in sentence
    assert log.count(WARNING) == 1


ON_COMMAND_LINES = """
import contextlib, io, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
checkpoint = f"{sys.argv[1]}/hidden_transfer"
for way in (
    ["--spec-method", "hidden_transfer"],
    ["--spec-method=hidden_transfer", "--spec-model", checkpoint],
    ["--speculative-model", "hidden_transfer"],
    ["--spec-model", checkpoint],
    ["--spec-method", "nonsense"],
    ["--spec-method", "ngram"],
):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", sys.argv[1], *way]))
            args.create_engine_config()
        except (SystemExit, ValueError) as error:
            print("REFUSED", (said.getvalue().strip() or str(error)).splitlines()[-1])
"""


def test_command_lines(reason: str, target: Path) -> None:
    done = run(sys.executable, "-c", ON_COMMAND_LINES, str(target))
    assert done.returncode == 0, done.stderr[-3000:]
    refused = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(refused) == 6
    for line in refused[:4]:
        assert reason in line
        assert "install vLLM 0.32.0" in line
    for line in refused[
        4:
    ]:  # vLLM's own word, of a method that does not exist and of one without its options
        assert reason not in line


def test_a_seam_that_only_engines_need(
    target: Path, answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a seam is missed where our method is asked for, and nowhere else."""
    set_up(monkeypatch, {})
    script = IN_PYTHON.replace(
        "    checkpoint =",
        "    import vllm.v1.worker.gpu_model_runner as module\n"
        "    del module.GPUModelRunner._get_eagle3_aux_layers_from_config\n"
        "    checkpoint =",
    )
    found, refused, log = in_python(target, script)
    assert found == answer
    assert WARNING not in log
    assert len(refused) == 4
    for sentence in refused:
        assert "_get_eagle3_aux_layers_from_config is not there" in sentence
        assert "install vLLM 0.32.0" in sentence


@pytest.mark.matrix
def test_the_override(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(monkeypatch, OTHERS["version"][0])
    monkeypatch.setenv("VLLM_HIDDEN_TRANSFER_ALLOW_UNTESTED_VLLM", "1")
    script = IN_PYTHON.replace('print("REFUSED not")', 'print("REFUSED", "not")')
    _, refused, log = in_python(target, script)
    assert refused == ["not"] * 4
    assert "UNTESTED vLLM 0.33.0" in log
    assert WARNING not in log
