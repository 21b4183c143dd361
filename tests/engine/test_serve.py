# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with every way in, a real client, the demo target and its trained maps."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.engines import engine
from tests.support.servers import SMALL, VLLM, chat, metric, serve

pytestmark = pytest.mark.engine

QUESTIONS = [
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "Correct this sentence: she go to school every days.",
]
WAYS = [
    ["--speculative-model", "hidden_transfer"],
    ["--speculative-model", "{target}/hidden_transfer"],
    ["--spec-method", "hidden_transfer", "--spec-model", "{target}/hidden_transfer"],
    [
        "--speculative-config",
        '{{"method":"hidden_transfer","model":"{target}/hidden_transfer/published"}}',
    ],
    [
        "--speculative-config",
        '{{"method":"hidden_transfer","sources":["lookup","recycling"]}}',
    ],
]


@pytest.fixture(scope="module")
def answers(demo_target: Path) -> list[str]:
    """What the target says without speculation."""
    from vllm import SamplingParams

    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with engine(demo_target, skip_tokenizer_init=False, max_model_len=1024) as llm:
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=" ".join(way), marks=pytest.mark.matrix if index else ())
        for index, way in enumerate(WAYS)
    ],
)
@pytest.mark.scope("way", "vllm serve")
def test_the_same_text(
    way: list[str], answers: list[str], demo_target: Path, tmp_path: Path
) -> None:
    arguments = [argument.format(target=demo_target) for argument in way]
    log = tmp_path / "on.log"
    with serve(demo_target, "--dtype", "float32", *arguments, log=log) as url:
        assert chat(url, QUESTIONS) == answers
        assert chat(url, QUESTIONS, stream=True) == answers
        drafts = metric(url, "vllm:spec_decode_num_drafts_total")
        accepted = metric(url, "vllm:spec_decode_num_accepted_tokens_total")
    assert drafts > 0
    # How many are worth drafting is the budget's affair, and hangs on the machine.
    assert accepted / drafts > 0.3 or drafts < 20
    banner = [line for line in log.read_text().splitlines() if "hidden_transfer is on" in line]
    assert len(banner) == 1
    for word in ("16 nodes", "float32", "CPU_ATTN"):
        assert word in banner[0]
    # vLLM's engine core makes the configuration again and warns there of max_num_scheduled_tokens: docs/operations.md.
    for word in ("experimental", "custom proposer", "Async scheduling not supported"):
        assert word not in log.read_text()
    if "sources" in " ".join(way):
        assert "drafts of prompt lookup and token recycling, without maps" in banner[0]
        return
    for word in ("two-pass", "k = 4", "t = 16 of 30"):
        assert word in banner[0]
    # The published maps are those of the paper, without bigrams.
    published = "published" in " ".join(way)
    assert ("published maps, k" if published else "with bigrams of rank 64, k") in banner[0]


def test_a_refusal_is_one_sentence(random_target: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(VLLM), "serve", str(random_target), *SMALL, "--speculative-model", "hidden_transfer"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("vllm serve: there is no transfer checkpoint")
    )


def run_bench(kind: str, *arguments: str, cwd: Path) -> str:
    """What ``vllm bench`` printed."""
    done = subprocess.run(
        [str(VLLM), "bench", kind, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=cwd,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"},  # the banner is an INFO line
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-4000:]
    return printed


SIZES = {
    "throughput": "--dataset-name random --random-input-len 32 --random-output-len 16 --num-prompts 8",
    "latency": "--input-len 32 --output-len 16 --batch-size 2 --num-iters 2 --num-iters-warmup 1",
}


@pytest.mark.matrix
@pytest.mark.parametrize("bench", SIZES)
@pytest.mark.scope("way", "vllm bench")
def test_vllm_bench(bench: str, demo_target: Path, tmp_path: Path) -> None:
    target = ["--model", str(demo_target), "--dtype", "float32", *SMALL]
    way = ["--speculative-model", "hidden_transfer"]
    printed = run_bench(bench, *target, *way, *SIZES[bench].split(), cwd=tmp_path)
    assert "hidden_transfer is on" in printed


@pytest.mark.matrix
@pytest.mark.scope("way", "vllm bench")
def test_vllm_bench_serve(demo_target: Path, tmp_path: Path) -> None:
    way = ["--dtype", "float32", "--speculative-model", "hidden_transfer"]
    with serve(demo_target, *way, log=tmp_path / "on.log") as url:
        client = ["--base-url", url, "--model", str(demo_target)]
        printed = run_bench("serve", *client, *SIZES["throughput"].split(), cwd=tmp_path)
    assert "Acceptance length" in printed
