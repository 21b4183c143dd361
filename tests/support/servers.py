# SPDX-License-Identifier: Apache-2.0
"""A real ``vllm serve`` in a process of its own, on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Servers find the test doubles there."""
VLLM = Path(sys.executable).with_name("vllm")
SMALL = (
    "--kv-cache-memory-bytes",
    str(1 << 28),
    "--max-model-len",
    "1024",
    "--max-num-seqs",
    "8",
    "--enforce-eager",
    "--block-size",
    "32",
)
ALWAYS = ("--speculative-config", '{"method": "hidden_transfer", "always_draft": true}')
"""With drafts at every step: whether they pay hangs on the machine."""


@contextmanager
def serve(
    target: Path, *arguments: str, log: Path, vllm: Path = VLLM, seconds: float = 300
) -> Iterator[str]:
    """Run ``vllm serve target arguments`` and yield its base URL once it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(vllm), "serve", str(target), "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    if vllm == VLLM:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *SMALL, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log, seconds)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended: {log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"vllm serve is not healthy after {seconds} s: {log.read_text()[-3000:]}")


def chat(
    url: str, questions: Sequence[str], *, stream: bool = False, tokens: int = 32
) -> list[str]:
    """Ask a server the questions with the ``openai`` client, greedily."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    answers = []
    for question in questions:
        reply = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=tokens,
            stream=stream,
        )
        if stream:
            parts = [chunk.choices[0].delta.content or "" for chunk in reply if chunk.choices]
            answers.append("".join(parts))
        else:
            answers.append(reply.choices[0].message.content or "")
    return answers


def metric(url: str, name: str) -> float:
    """The sum of one counter in the server's ``/metrics``."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
