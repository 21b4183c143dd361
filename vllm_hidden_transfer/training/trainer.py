# SPDX-License-Identifier: Apache-2.0
"""The training loop: AdamW on a drafter's weights, exactly resumable, with a progress bar and a JSONL log."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vllm_hidden_transfer.checkpoint.maps import TransferMaps, write_atomically
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import Prefixes
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.training.objective import (
    Candidates,
    DraftingModel,
    MapsInTraining,
    TaughtRows,
    draft_loss,
    draw_roots,
)
from vllm_hidden_transfer.training.parallel import Processes

STATE_FILE = "state.safetensors"
LOG_FILE = "log.jsonl"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingConfig(BaseModel):
    """Settings of one run. Two runs with the same settings and corpus are the same run."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    steps: PositiveInt = 600
    """optimiser steps"""
    sequences: PositiveInt = 16
    """sequences of a step, over all processes"""
    roots: PositiveInt = 10
    """random roots of each sequence; every root has k rows"""
    learning_rate: PositiveFloat = 5e-4
    """peak learning rate of the maps"""
    embedding_scale: PositiveFloat = 16.0
    """learning rate of the embedding's maps over that of the state's: embeddings are smaller"""
    warmup: NonNegativeInt = 20
    """steps of linear warm-up"""
    final_rate: Annotated[float, Field(ge=0, le=1)] = 0.05
    """learning rate at the end, as a share of the peak; a cosine leads there"""
    step_decay: PositiveFloat = 0.8
    """transfer step i counts this to the power of i - 1 in the loss"""
    clip: PositiveFloat = 1.0
    """largest gradient norm"""
    negatives: Annotated[int, Field(ge=-1)] = 2048
    """random tokens that stand for the unlikely part of the vocabulary; -1 takes all of it"""
    seed: NonNegativeInt = 20261121
    """seed of batches and roots"""
    save_seconds: PositiveFloat = 120.0
    """seconds between two saved states: what a crash loses at most"""
    log_every: PositiveInt = 10
    """steps between two lines of the log"""


class InterruptedTraining(Exception):  # noqa: N818  no error
    """SIGTERM or SIGINT came; the state is saved."""


class DraftTrainer:
    """Trains a drafter against a frozen target on a cached corpus; state and log live in `folder`.

    Args:
        frozen: says which target it is; a state that was saved with another one is refused.
    """

    def __init__(
        self,
        model: DraftingModel[Any],
        examples: list[Example],
        config: TrainingConfig,
        folder: str | Path,
        processes: Processes = Processes(),  # noqa: B008  frozen
        frozen: str = "",
    ) -> None:
        if not examples:
            raise ValueError("there are no training examples")
        if config.sequences % processes.count:
            raise ValueError(
                f"{config.sequences} sequences a step cannot be shared by {processes.count} processes: "
                "choose a multiple"
            )
        self.model, self.target, self.cache = model, model.target, model.cache
        self.examples = examples
        self.module = model.module.float().to(self.target.device).requires_grad_(True)
        self.config, self.processes, self.frozen = config, processes, frozen
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.step = 0
        self._core = self.cache.likely_tokens(examples)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [parameter], "scale": self._scale(name)}
                for name, parameter in self.module.named_parameters()
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        self._stop = False
        self._load_state()
        self._start_as_the_first()

    @staticmethod
    def is_saved(folder: str | Path) -> bool:
        """Whether a run in `folder` has saved its state, so that its start does not matter any more."""
        return (Path(folder) / STATE_FILE).exists()

    def batch(self, step: int) -> TaughtRows:
        """This process's rows of a step. All rows are a function of seed and step alone: that makes resuming exact,
        and several processes learn from the same rows as one."""
        config = self.config
        rng = np.random.default_rng([config.seed, step])
        chosen = []
        for slot in range(step * config.sequences, (step + 1) * config.sequences):
            epoch, place = divmod(slot, len(self.examples))
            order = np.random.default_rng([config.seed, 1 << 20, epoch])
            chosen.append(self.examples[order.permutation(len(self.examples))[place]])
        roots = [draw_roots(rng, example, config.roots) for example in chosen]
        own = slice(self.processes.rank, None, self.processes.count)
        rows: TaughtRows = self.model.rows(chosen[own], roots[own])
        return rows

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_rate` of the peak."""
        config = self.config
        warm = min(1.0, (step + 1) / max(config.warmup, 1))
        done = min(1.0, step / max(config.steps, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return config.learning_rate * warm * (config.final_rate + (1 - config.final_rate) * cosine)

    def train_step(self) -> dict[str, Any]:
        """One optimiser step; returns what the log gets."""
        rows = self.batch(self.step)
        config = self.config
        drafted = self.model.draft(rows)
        decay = config.step_decay ** torch.arange(self.model.steps, dtype=torch.float32)
        decay = decay.to(self.target.device)
        weight_sum = self.processes.sum((rows.valid * decay).sum())
        loss = draft_loss(self.target, drafted, rows, decay, self._candidates(), weight_sum)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        for parameter in self.module.parameters():
            assert parameter.grad is not None
            self.processes.sum(parameter.grad)
        figures = self.processes.sum(
            torch.stack([loss.kl, loss.agreed, loss.counts, loss.total.detach().expand_as(loss.kl)])
        )
        kl, agreement = figures[:2] / figures[2].clamp_min(1)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), config.clip)
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.step()
        self.step += 1
        return {
            "step": self.step,
            "loss": float(figures[3, 0]),
            "kl": [round(float(x), 4) for x in kl],
            "agreement": [round(float(x), 4) for x in agreement],
            "rows": int(figures[2].sum()),
            "rate": rate,
            "gradient_norm": float(norm),
        }

    def _candidates(self) -> Candidates:
        head = self.target.head_weight
        if self.config.negatives < 0:
            return Candidates.everything(head)
        rng = np.random.default_rng([self.config.seed, self.step, 1])
        return Candidates.sample(head, self._core, self.config.negatives, rng)

    def run(self, on_log: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Train to the last step.

        Raises:
            InterruptedTraining: after SIGTERM or SIGINT; running again goes on at the same step.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}, {task.fields[speed]:.0f} rows/s"),
            TimeRemainingColumn(),
        )
        saved, window = time.monotonic(), []
        started = time.monotonic()
        seen = 0
        with self._signals(), Progress(*columns, disable=not self.processes.first) as progress:
            task = progress.add_task(
                "training",
                total=self.config.steps,
                completed=self.step,
                loss=float("nan"),
                speed=0.0,
            )
            while self.step < self.config.steps:
                record = self.train_step()
                window.append(record)
                seen += record["rows"]
                recent = sum(r["loss"] for r in window) / len(window)
                speed = seen / (time.monotonic() - started)
                progress.update(task, completed=self.step, loss=recent, speed=speed)
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    entry = _mean(window) | {"seconds": round(time.monotonic() - started, 1)}
                    self._log(entry)
                    if on_log is not None:
                        on_log(entry)
                    window.clear()
                stop = self.processes.any(self._stop)
                if time.monotonic() - saved > self.config.save_seconds or stop:
                    self.save_state()
                    saved = time.monotonic()
                if stop:
                    raise InterruptedTraining(f"stopped at step {self.step}; the state is saved")
        self.save_state()

    def save_state(self) -> None:
        """Write step, weights and optimiser state (safetensors, all or nothing)."""
        if not self.processes.first:
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            tensors[name] = parameter.detach()
            state = self.optimizer.state.get(parameter, {})
            for part in _MOMENTS:
                if part in state:
                    tensors[f"{name}.{part}"] = state[part]
        about = {"format": "pt", "step": str(self.step), "run": self._run_of()}
        write_atomically(self.folder / STATE_FILE, save(tensors, metadata=about))

    def _load_state(self) -> None:
        path = self.folder / STATE_FILE
        if not path.exists():
            return
        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it to start again") from error
        # A file that somebody wrote anew (converted, stripped) need not say what it is.
        if not about.get("step", "").isdecimal() or "run" not in about:
            raise ValueError(
                f"{path} does not say of which run it is (its safetensors metadata lacks step and run): remove it to "
                "start again"
            )
        if about["run"] != self._run_of():
            raise ValueError(
                f"{path} belongs to a run with other settings, data or another target: use another folder or "
                "remove it"
            )
        self.step = int(about["step"])
        for name, parameter in self.module.named_parameters():
            parts = {name: parameter.detach()}
            if self.step:
                moments = self._moments(parameter)
                parts |= {f"{name}.{part}": moments[part] for part in _MOMENTS}
            for stored, tensor in parts.items():
                if stored not in tensors or tensors[stored].shape != tensor.shape:
                    raise ValueError(
                        f"{path} lacks {stored} of the shape {list(tensor.shape)}: remove it to start again"
                    )
                tensor.copy_(tensors[stored])
        self._cut_log()

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's state of a parameter at this step; zeros where it had none."""
        state: dict[str, Tensor] = self.optimizer.state[parameter]
        state["step"] = torch.tensor(float(self.step))
        for part in _MOMENTS:
            state.setdefault(part, torch.zeros_like(parameter))
        return state

    def _start_as_the_first(self) -> None:
        """Step, weights and moments of the first process, which alone need have found a saved state: ranks only
        exchange gradients, so that what differs at the start would differ for ever."""
        self.step = self.processes.number_of_first(self.step)
        for parameter in self.module.parameters():
            self.processes.from_first(parameter.detach())
            if self.step:
                moments = self._moments(parameter)
                for part in _MOMENTS:
                    self.processes.from_first(moments[part])

    def _run_of(self) -> str:
        """What must not change while a run goes on."""
        settings = self.config.model_dump(exclude={"save_seconds", "log_every"})
        corpus = hashlib.sha256("".join(e.digest for e in self.examples).encode()).hexdigest()
        return json.dumps(
            settings | {"corpus": corpus, "target": self.frozen} | self.model.identity
        )

    def _cut_log(self) -> None:
        """Drop what a killed run logged after it last saved."""
        log = self.folder / LOG_FILE
        if not self.processes.first or not log.exists():
            return
        lines = log.read_text().splitlines(keepends=True)
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step
        ]
        write_atomically(log, "".join(kept).encode())

    def _scale(self, name: str) -> float:
        return self.config.embedding_scale if name in ("token_weight", "down") else 1.0

    def _log(self, entry: dict[str, Any]) -> None:
        if not self.processes.first:
            return
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(signum: int, frame: FrameType | None) -> None:
            self._stop = True

        previous = {
            number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Trainer(DraftTrainer):
    """Trains transfer maps."""

    def __init__(
        self,
        target: FrozenTarget,
        cache: Prefixes,
        examples: list[Example],
        maps: TransferMaps,
        config: TrainingConfig,
        folder: str | Path,
        processes: Processes = Processes(),  # noqa: B008  frozen
        frozen: str = "",
    ) -> None:
        self.maps = maps
        model = MapsInTraining(target, cache, maps)
        super().__init__(model, examples, config, folder, processes, frozen)


def _mean(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The last record with its figures averaged over all."""
    entry = dict(records[-1])
    for name in ("loss", "kl", "agreement", "gradient_norm"):
        entry[name] = np.round(np.mean([record[name] for record in records], axis=0), 4).tolist()
    return entry
