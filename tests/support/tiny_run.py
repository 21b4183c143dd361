# SPDX-License-Identifier: Apache-2.0
"""A training run of seconds as a process of its own: ``python -m tests.support.tiny_run FOLDER STEPS SAVE_SECONDS``,
alone or under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from tests.support.models import tiny_llama
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import PrefixPasses
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.training.parallel import joined_processes
from vllm_hidden_transfer.training.ridge import ridge_maps
from vllm_hidden_transfer.training.trainer import Trainer, TrainingConfig

VOCABULARY, STEPS, LAYER = 97, 3, 2


def main(folder: Path, steps: int, save_seconds: float) -> None:
    torch.set_num_threads(1)
    target = FrozenTarget(tiny_llama(VOCABULARY), LAYER)
    rng = np.random.default_rng(0)
    examples = [
        Example(str(number), "text", None, [1], rng.integers(0, VOCABULARY, 20).tolist())
        for number in range(8)
    ]
    prefixes = PrefixPasses(target, len(examples))
    settings = TrainingConfig(
        steps=steps,
        sequences=4,
        roots=6,
        learning_rate=3e-3,
        warmup=2,
        negatives=-1,
        log_every=1,
        save_seconds=save_seconds,
    )
    with joined_processes("cpu") as processes:
        maps = ridge_maps(prefixes, target, examples, STEPS, "token", strength=1.0)
        Trainer(target, prefixes, examples, maps, settings, folder, processes).run()
        processes.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
