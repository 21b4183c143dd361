# SPDX-License-Identifier: Apache-2.0
"""Training as real processes: two of them under torchrun learn like one, and kill -9 never costs more than a while."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support import tiny_run
from vllm_hidden_transfer.training.trainer import LOG_FILE, STATE_FILE

pytestmark = pytest.mark.slow

RUN = ["-m", "tests.support.tiny_run"]
ROOT = Path(__file__).parents[2]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / LOG_FILE).read_text().splitlines()]


def maps_of(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(str(folder / STATE_FILE), framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def start(folder: Path, steps: int, save_seconds: float = 60.0) -> BaseProcess:
    """A process that trains. They are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.tiny_run"])
    process = context.Process(target=tiny_run.main, args=(folder, steps, save_seconds))
    process.start()
    return process


def finish(folder: Path, steps: int, save_seconds: float = 60.0) -> None:
    process = start(folder, steps, save_seconds)
    process.join(120)
    assert process.exitcode == 0


def torchrun(*arguments: str) -> None:
    """Two ranks that end well."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, *arguments], cwd=ROOT, check=True, timeout=300)


def test_the_others_wait_for_the_first_as_long_as_it_works(tmp_path: Path) -> None:
    torchrun("-m", "tests.support.ranks", "first_works_alone", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_ranks_that_start_differently_end_up_equal(tmp_path: Path) -> None:
    """From the start, and where only the first rank finds the saved state: weights, moments and step are its own."""
    torchrun("-m", "tests.support.ranks", "other_starts", str(tmp_path))
    before: dict[str, torch.Tensor] = {}
    for moment in ("start-1", "end-1", "start-2", "end-2"):
        ranks = [load_file(tmp_path / f"{moment}-{rank}") for rank in (0, 1)]
        for name, tensor in ranks[0].items():
            assert torch.equal(ranks[1][name], tensor), (moment, name)
        if moment == "start-2":
            assert all(torch.equal(before[name], tensor) for name, tensor in ranks[0].items())
        elif before:
            assert not torch.equal(before["weight"], ranks[0]["weight"])
        before = ranks[0]
    for sitting, step in ((1, "2"), (2, "4")):
        assert {(tmp_path / f"step-{sitting}-{rank}").read_text() for rank in (0, 1)} == {step}


def test_the_ranks_of_a_run_hold_its_work_folder_together(tmp_path: Path) -> None:
    torchrun("-m", "tests.support.ranks", "one_work_folder", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("held-0", "held-1", "refused-0", "refused-1", "work")
    ]


def test_two_processes_learn_like_one(tmp_path: Path) -> None:
    finish(tmp_path / "one", 8)
    two = tmp_path / "two"
    torchrun(*RUN, str(two), "8", "60")
    assert losses(two) == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    one_maps, two_maps = maps_of(tmp_path / "one"), maps_of(two)
    for name in ("weight", "token_weight"):
        np.testing.assert_allclose(two_maps[name], one_maps[name], rtol=1e-2, atol=1e-4)


def test_kill_9_never_leaves_an_unloadable_folder(tmp_path: Path) -> None:
    """Ten kills at random moments of a run that saves all the time, then it is finished: as if it had never been
    stopped, bit by bit."""
    steps = 400
    finish(tmp_path / "whole", steps)
    killed = tmp_path / "killed"
    rng = np.random.default_rng(20261121)
    stopped = 0
    for _ in range(10):
        process = start(killed, steps, 0.001)
        wait_for_progress(killed, process)
        time.sleep(float(rng.uniform(0.0, 0.3)))
        stopped += process.is_alive()
        process.kill()
        process.join()
        if (killed / STATE_FILE).exists():
            assert set(maps_of(killed)) >= {"weight", "token_weight"}
    assert stopped >= 8
    finish(killed, steps, 0.001)
    whole, again = maps_of(tmp_path / "whole"), maps_of(killed)
    for name, tensor in whole.items():
        assert np.array_equal(tensor, again[name]), name
    assert losses(killed) == losses(tmp_path / "whole")


def wait_for_progress(folder: Path, process: BaseProcess) -> None:
    """Until the run has written something new: killing it while it still imports torch would test nothing."""
    state = folder / STATE_FILE
    before = state.stat().st_mtime_ns if state.exists() else 0
    for _ in range(600):
        if not process.is_alive() or (state.exists() and state.stat().st_mtime_ns != before):
            return
        time.sleep(0.05)
