# SPDX-License-Identifier: Apache-2.0
"""A process of the engine is killed while requests run: what follows is what follows without speculation."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.checkpoints import random_checkpoint
from tests.support.engines import random_prompts
from tests.support.models import add_tokenizer, random_model
from tests.support.servers import metric, serve

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

PATIENCE = 180.0
"""Seconds for what takes less than ten on an idle machine: on a full one, ranks wait for each other at every layer."""
TENSOR_PARALLEL = ("--tensor-parallel-size", "2", "--distributed-executor-backend", "mp")
VICTIMS: dict[str, tuple[str, ...]] = {"EngineCore": (), "Worker_TP1": TENSOR_PARALLEL}
"""Part of the name of the process that is killed, and how to get a server that has one."""


@dataclass(frozen=True)
class Fate:
    """How a server and its clients ended."""

    answers: tuple[str, ...]
    """Of each client: complete, an error, or nothing at all."""
    exit_code: int | None
    """Of the server; None where it went on."""
    left: tuple[str, ...]
    """Processes of the server that went on."""
    seconds: float

    def without_time(self) -> Fate:
        return replace(self, seconds=0)


class Clients:
    """Long requests, streamed and not, that are all running before anything is killed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._started = threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(4)
        prompts = random_prompts(4, lengths=[20, 40, 30, 50])
        self._answers = [
            self._pool.submit(self._ask, prompt, index % 2 == 0)
            for index, prompt in enumerate(prompts)
        ]
        for _ in range(0, len(prompts), 2):
            assert self._started.acquire(timeout=PATIENCE)

    def _ask(self, prompt: list[int], stream: bool) -> str:
        request = {
            "prompt": prompt,
            "max_tokens": 900,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        text = ""
        url = f"{self._url}/v1/completions"
        try:
            with httpx.stream("POST", url, json=request, timeout=PATIENCE) as reply:
                for piece in reply.iter_text():
                    if stream and not text:
                        self._started.release()
                    text += piece
        except httpx.TimeoutException:
            return "nothing"
        except httpx.HTTPError:
            return "an error"
        if reply.status_code != 200 or '"error"' in text:
            return "an error"
        return "complete" if text else "nothing"

    def answers(self) -> tuple[str, ...]:
        return tuple(answer.result(2 * PATIENCE) for answer in self._answers)


def family_of_server() -> list[psutil.Process]:
    """The server that this process has started, and all that it has started."""
    (server,) = [each for each in psutil.Process().children() if " serve " in name_of(each)]
    return [server, *server.children(recursive=True)]


def name_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()) or process.name()
    return "gone"


@contextlib.contextmanager
def ends_by_itself() -> Iterator[None]:
    """``serve`` stops its processes on the way out; here there may be none left to stop."""
    with contextlib.suppress(ProcessLookupError):
        yield


def kill(victim: str, target: Path, log: Path, *arguments: str) -> Fate:
    """Serve, ask, kill, and see."""
    with ends_by_itself(), serve(target, "--dtype", "float32", *arguments, log=log) as url:
        processes = family_of_server()
        server = processes[0]
        clients = Clients(url)
        if "--speculative-config" in arguments:
            assert metric(url, "vllm:spec_decode_num_drafts_total") > 0
        (chosen,) = [process for process in processes if victim in name_of(process)]
        begin = time.monotonic()
        chosen.kill()
        answers = clients.answers()
        try:
            exit_code = server.wait(PATIENCE)
        except psutil.TimeoutExpired:
            exit_code = None
        _, alive = psutil.wait_procs(processes, timeout=PATIENCE / 2)
        seconds = time.monotonic() - begin
        left = tuple(name_of(process) for process in alive)
        fate = Fate(answers, exit_code, left, seconds)
    return fate


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = add_tokenizer(random_model(tmp_path_factory.mktemp("killed") / "target"))
    random_checkpoint(folder / "hidden_transfer", folder)
    return folder


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_process(
    victim: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every client gets an error, the server ends, and no process of it is left."""
    if VICTIMS[victim]:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    stock = kill(victim, target, tmp_path / "stock.log", *VICTIMS[victim])
    method = json.dumps({"method": "hidden_transfer", "always_draft": True})
    ours = kill(
        victim,
        target,
        tmp_path / "ours.log",
        "--speculative-config",
        method,
        *VICTIMS[victim],
    )
    print(f"{victim}: without speculation {stock}, with trees {ours}")
    assert set(ours.answers) == {"an error"}
    assert ours.left == ()
    assert ours.without_time() == stock.without_time()
