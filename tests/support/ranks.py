# SPDX-License-Identifier: Apache-2.0
"""What two ranks do in tests: ``torchrun ... -m tests.support.ranks CASE FOLDER``."""

from __future__ import annotations

import fcntl
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import distributed_c10d

from tests.support.models import tiny_llama
from vllm_hidden_transfer.checkpoint.maps import TransferMaps
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import PrefixPasses
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.training.parallel import Processes, joined_processes
from vllm_hidden_transfer.training.trainer import Trainer, TrainingConfig
from vllm_hidden_transfer.training.work_lock import LOCK_FILE, sole_run

VOCABULARY, STEPS, LAYER = 97, 3, 2
TORCH_WAITS = timedelta(seconds=2)


def first_works_alone(folder: Path, processes: Processes) -> None:
    """The first rank is busy for longer than torch would wait by itself, at each kind of meeting."""
    for meet in (
        processes.wait,
        lambda: processes.any(False),
        lambda: processes.number_of_first(1),
    ):
        if processes.first:
            time.sleep(2 * TORCH_WAITS.total_seconds())
        meet()
    (folder / str(processes.rank)).touch()


def other_starts(folder: Path, processes: Processes) -> None:
    """Every rank begins with weights of its own, and, where the folder has a state, only the first knows it."""
    own = folder / f"of-{processes.rank}"
    torch.manual_seed(processes.rank)
    maps = TransferMaps(STEPS, 32, "token").requires_grad_(False)
    for parameter in maps.parameters():
        parameter.copy_(torch.randn(parameter.shape) / 8)
    rng = np.random.default_rng(0)
    examples = [
        Example(str(number), "text", None, [1], rng.integers(0, VOCABULARY, 20).tolist())
        for number in range(8)
    ]
    target = FrozenTarget(tiny_llama(VOCABULARY), LAYER)
    prefixes = PrefixPasses(target, len(examples))
    config = TrainingConfig(steps=4, sequences=4, roots=6, warmup=2, negatives=-1)
    for sitting in (1, 2):
        # Only the first rank saves, and the folders are not shared: it alone knows where the second sitting begins.
        trainer = Trainer(target, prefixes, examples, maps, config, own, processes)
        save_file(dict(trainer.module.state_dict()), folder / f"start-{sitting}-{processes.rank}")
        trainer.train_step()
        trainer.train_step()
        trainer.save_state()
        save_file(dict(trainer.module.state_dict()), folder / f"end-{sitting}-{processes.rank}")
        (folder / f"step-{sitting}-{processes.rank}").write_text(str(trainer.step))


def one_work_folder(folder: Path, processes: Processes) -> None:
    """The ranks of one run share its folder; where another run has it, all of them are refused together."""
    work = folder / "work"
    with sole_run(work, processes):
        processes.wait()
        (folder / f"held-{processes.rank}").touch()
        if processes.first:
            with pytest.raises(ValueError, match="another `train`"), sole_run(work, Processes()):
                pass
        processes.wait()
    with (folder / "work" / LOCK_FILE).open() as file:
        if processes.first:
            fcntl.flock(file, fcntl.LOCK_EX)
        processes.wait()
        with pytest.raises(ValueError, match="another `train`"), sole_run(work, processes):
            pass
    (folder / f"refused-{processes.rank}").touch()


CASES = {each.__name__: each for each in (first_works_alone, other_starts, one_work_folder)}


def main(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed_c10d.default_pg_timeout = TORCH_WAITS
    with joined_processes("cpu") as processes:
        CASES[case](folder, processes)
        processes.wait()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
