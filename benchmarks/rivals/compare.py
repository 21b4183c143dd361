# SPDX-License-Identifier: Apache-2.0
"""The comparison: a sweep, a training of stated minutes and a judgement for each drafter, each kept when it is done.

All drafters get the same trainer, batches, roots, loss, schedule, calibration and walks. Minutes are of processor time,
over all threads: what else the machine does meanwhile then takes nothing from a drafter.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from safetensors.torch import load_file, save
from torch import Tensor, nn

from benchmarks.rivals.contestants import Choice, Contestant, Sources
from vllm_hidden_transfer.checkpoint.maps import write_atomically
from vllm_hidden_transfer.evaluation.calibration import fit_temperatures
from vllm_hidden_transfer.evaluation.drafts import Drafts, JudgedAnswer, drafts_from_states
from vllm_hidden_transfer.evaluation.preparation import progress_bar
from vllm_hidden_transfer.evaluation.study import Judged, judge, judged_answers
from vllm_hidden_transfer.evaluation.study_result import Group
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.training.objective import DraftingModel, draft_loss, draw_roots
from vllm_hidden_transfer.training.trainer import DraftTrainer, TrainingConfig

BUDGETS = (8, 16, 32)
JUDGED_TOKENS = 96
_HELD_OUT_ROOTS = 8
_ROOTS_AT_ONCE = 128
_WARM_STEPS, _TIMED_STEPS = 2, 11


class ComparisonError(ValueError):
    """The comparison cannot start or go on; the message is one sentence."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Plan(_Part):
    """What a training is, decided once: its learning rate depends on the number of steps."""

    choice: Choice
    minutes: float
    """What was asked for, start included."""
    seconds_per_step: float
    """Median of some steps."""
    start_seconds: float
    steps: int


class Trial(_Part):
    """A training, and what came out on held-out rows."""

    plan: Plan
    minutes: float
    """What it took, start included."""
    kl: list[float]
    """Mean KL to the target in nats at each depth, over the whole vocabulary."""
    loss: float
    """The same in one number, with the loss's weights."""

    @property
    def choice(self) -> Choice:
        """Its settings."""
        return self.plan.choice


class Sweep(_Part):
    """All trials of a drafter."""

    trials: list[Trial]

    @property
    def best(self) -> Trial:
        """The one with the least held-out loss."""
        return min(self.trials, key=lambda trial: trial.loss)


class Origin(_Part):
    """Where figures come from."""

    command: str
    commit: str
    machine: str
    threads: int


class Training(_Part):
    """The training of stated minutes."""

    trial: Trial
    parameters: int
    draft_share: float
    """Weights that drafting k tokens reads, over those that a pass of the target reads."""
    origin: Origin


class Judgement(_Part):
    """What the trained drafter is worth on the judged answers."""

    answers_digest: str
    weights_digest: str
    max_tokens: int
    temperatures: list[float]
    groups: list[Group]
    origin: Origin


@dataclass(frozen=True)
class Bench:
    """What all drafters share."""

    sources: Sources
    train: list[Example]
    held_out: list[Example]
    """To choose and to calibrate on."""
    judged: list[Example]
    config: TrainingConfig
    folder: Path
    minutes: float
    sweep_minutes: float
    origin: Origin
    console: Console


PartT = TypeVar("PartT", bound=_Part)


def kept(path: Path, kind: type[PartT]) -> PartT | None:
    """A finished part, or None.

    Raises:
        ComparisonError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ComparisonError(f"{path} is damaged: remove it to do that part again") from error


def keep(path: Path, part: PartT) -> PartT:
    """Keep a finished part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (part.model_dump_json(indent=1) + "\n").encode())
    return part


def compare(bench: Bench, contestant: Contestant) -> None:
    """Sweep, train and judge one drafter, as far as that is not done."""
    training = train(bench, contestant, sweep(bench, contestant).best.choice)
    judge_drafter(bench, contestant, training.trial.choice)


def sweep(bench: Bench, contestant: Contestant) -> Sweep:
    """Try the learning rates, then at the best of them the variants, all in `sweep_minutes` of training.

    All trials have as many steps, and starts do not count here: they are made once for all trainings.
    """
    count = len(contestant.rates) + len(contestant.variants)
    found = Sweep(trials=[])

    def attempt(choice: Choice) -> None:
        folder = bench.folder / contestant.name / "sweep" / choice.label
        bench.console.print(f"{contestant.title}: trying {describe(choice)}")
        plan = found.trials[0].plan if found.trials else None
        minutes = bench.sweep_minutes / count
        found.trials.append(run(bench, contestant, choice, folder, minutes, False, plan))

    scale = bench.config.embedding_scale
    for rate in contestant.rates:
        attempt(Choice(learning_rate=rate, start=contestant.start, embedding_scale=scale))
    best = found.best.choice
    for variant in contestant.variants:
        attempt(best.model_copy(update=variant))
    return found


def train(bench: Bench, contestant: Contestant, choice: Choice) -> Training:
    """The training of `minutes`, its start included."""
    folder = bench.folder / contestant.name
    bench.console.print(f"{contestant.title}: {bench.minutes:g} minutes with {describe(choice)}")
    trial = run(bench, contestant, choice, folder / "training", bench.minutes, True)
    path = folder / "training.json"
    found = kept(path, Training)
    if found and found.trial == trial:
        return found
    module = contestant.module(bench.sources)
    training = Training(
        trial=trial,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        draft_share=contestant.share(bench.sources, module),
        origin=bench.origin,
    )
    return keep(path, training)


def describe(choice: Choice) -> str:
    """A choice in words."""
    words = f"learning rate {choice.learning_rate:g}, start {choice.start}"
    if choice.feature_loss:
        words += f", feature loss {choice.feature_loss:g}"
    if choice.embedding_scale == 1:
        words += ", the same rate for embeddings"
    return words


def run(
    bench: Bench,
    contestant: Contestant,
    choice: Choice,
    folder: Path,
    minutes: float,
    count_start: bool,
    first: Plan | None = None,
) -> Trial:
    """One training in `folder`, from where it was stopped; the weights are left in bf16 beside its result.

    It takes as many steps as the plan of the `first` trial of its sweep; without one, as many as fit into the minutes.

    Raises:
        InterruptedTraining: stopped by a signal; running again goes on.
        ComparisonError: `folder` holds another training.
    """
    done = kept(folder / "trial.json", Trial)
    plan = done.plan if done else kept(folder / "plan.json", Plan)
    if plan and (plan.minutes, plan.choice) != (minutes, choice):
        raise ComparisonError(
            f"{folder} holds a training of {plan.minutes:g} minutes with {describe(plan.choice)}, not of "
            f"{minutes:g} with {describe(choice)}: ask for the same minutes or move it away"
        )
    if done:
        return done
    if plan is None:
        if first is None:
            plan = make_plan(bench, contestant, choice, minutes, count_start)
        else:
            plan = first.model_copy(update={"choice": choice})
        keep(folder / "plan.json", plan)
    module, _ = started(bench, contestant, choice.start)
    model = contestant.model(bench.sources, module, choice)
    config = _config(bench, choice, plan.steps)
    trainer = DraftTrainer(model, bench.train, config, folder)
    with _clock(folder) as clock:
        trainer.run(lambda entry: clock.write())
    write_atomically(folder / "weights.safetensors", save(_rounded(module)))
    kl = held_out_kl(model, bench.held_out, bench.config.seed)
    decay = bench.config.step_decay ** np.arange(len(kl))
    trial = Trial(
        plan=plan,
        minutes=(clock.seconds + plan.start_seconds) / 60,
        kl=[round(value, 4) for value in kl],
        loss=round(float(np.average(kl, weights=decay)), 5),
    )
    return keep(folder / "trial.json", trial)


def make_plan(
    bench: Bench, contestant: Contestant, choice: Choice, minutes: float, count_start: bool
) -> Plan:
    """Steps that fit into the minutes: the schedule has to end when they do."""
    module, start_seconds = started(bench, contestant, choice.start)
    model = contestant.model(bench.sources, module, choice)
    times = []
    with TemporaryDirectory() as folder:
        config = _config(bench, choice, _WARM_STEPS + _TIMED_STEPS)
        trainer = DraftTrainer(model, bench.train, config, folder)
        for _ in range(config.steps):
            began = time.process_time()
            trainer.train_step()
            times.append(time.process_time() - began)
    seconds = median(times[_WARM_STEPS:])
    counted = start_seconds if count_start else 0.0
    return Plan(
        choice=choice,
        minutes=minutes,
        seconds_per_step=seconds,
        start_seconds=counted,
        steps=max(1, round((60 * minutes - counted) / seconds)),
    )


def _config(bench: Bench, choice: Choice, steps: int) -> TrainingConfig:
    changes = {
        "learning_rate": choice.learning_rate,
        "embedding_scale": choice.embedding_scale,
        "steps": steps,
    }
    return bench.config.model_copy(update=changes)


def started(bench: Bench, contestant: Contestant, start: str) -> tuple[nn.Module, float]:
    """A drafter's weights with their start, and the seconds that making it took."""
    folder = bench.folder / contestant.name / f"start-{start}"
    module = contestant.module(bench.sources)
    took, weights = folder / "seconds.json", folder / "weights.safetensors"
    if not took.is_file():
        began = time.process_time()
        with progress_bar(bench.console) as progress:
            total = len(bench.train) * contestant.passes(start, bench.sources.steps)
            task = progress.add_task(f"{start} start", total=total)
            contestant.begin(
                bench.sources, module, start, bench.train, lambda: progress.advance(task)
            )
        seconds = time.process_time() - began
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(weights, save(_tensors(module)))
        write_atomically(took, json.dumps(seconds).encode())
    module.load_state_dict(load_file(weights))
    return module, float(json.loads(took.read_text()))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def _rounded(module: nn.Module) -> dict[str, Tensor]:
    """Round the weights to bf16, as a checkpoint stores them, and return them so."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    return {name: tensor.bfloat16() for name, tensor in _tensors(module).items()}


@dataclass
class _Clock:
    """Processor seconds of training over all sittings; written as it goes, because a sitting may be killed."""

    path: Path
    before: float
    began: float
    seconds: float

    def write(self) -> None:
        self.seconds = self.before + time.process_time() - self.began
        write_atomically(self.path, json.dumps(self.seconds).encode())


@contextmanager
def _clock(folder: Path) -> Iterator[_Clock]:
    path = folder / "seconds.json"
    before = float(json.loads(path.read_text())) if path.is_file() else 0.0
    clock = _Clock(path, before, time.process_time(), before)
    try:
        yield clock
    finally:
        clock.write()


@torch.no_grad()
def held_out_kl(model: DraftingModel[Any], examples: Sequence[Example], seed: int) -> list[float]:
    """Mean KL to the target at each depth [k], whole vocabulary, at roots that are the same for all drafters."""
    kl, counts = torch.zeros(model.steps), torch.zeros(model.steps)
    for number, example in enumerate(examples):
        roots = draw_roots(np.random.default_rng([seed, 2, number]), example, _HELD_OUT_ROOTS)
        rows = model.rows([example], [roots])
        weights = torch.ones(model.steps, device=model.target.device)
        loss = draft_loss(model.target, model.draft(rows), rows, weights)
        kl += loss.kl.cpu()
        counts += loss.counts.cpu()
    found: list[float] = (kl / counts.clamp_min(1)).tolist()
    return found


def judge_drafter(bench: Bench, contestant: Contestant, choice: Choice) -> Judgement:
    """Calibrate on held-out answers, then walk the judged ones."""
    folder = bench.folder / contestant.name
    answers = judged_answers(bench.judged, JUDGED_TOKENS)
    weights = folder / "training" / "weights.safetensors"
    of_answers = _digest("".join(answer.example.digest for answer in answers).encode())
    of_weights = _digest(weights.read_bytes())
    path = folder / "judgement.json"
    found = kept(path, Judgement)
    if found and (found.answers_digest, found.weights_digest) == (of_answers, of_weights):
        return found
    bench.console.print(f"{contestant.title}: judging on {len(answers)} answers")
    module = contestant.module(bench.sources).requires_grad_(False)
    module.load_state_dict({name: part.float() for name, part in load_file(weights).items()})
    model = contestant.model(bench.sources, module.to(bench.sources.target.device), choice)
    with progress_bar(bench.console) as progress:
        held_out = judged_answers(bench.held_out, JUDGED_TOKENS)
        temperatures = fit_temperatures(
            [drafts_of(model, each) for each in progress.track(held_out, description="calibrating")]
        )
        drafts = [
            drafts_of(model, each) for each in progress.track(answers, description="drafting")
        ]
        drafter = contestant.drafter(bench.sources, model, drafts, temperatures)
        groups = judge(Judged(drafts, drafter, temperatures), BUDGETS[1], progress, BUDGETS)
    return keep(
        path,
        Judgement(
            answers_digest=of_answers,
            weights_digest=of_weights,
            max_tokens=JUDGED_TOKENS,
            temperatures=temperatures,
            groups=groups,
            origin=bench.origin,
        ),
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@torch.no_grad()
def drafts_of(model: DraftingModel[Any], answer: JudgedAnswer) -> Drafts:
    """What a drafter says at every root of an answer, path by path along what came where it sees paths."""

    def states() -> Iterator[Tensor]:
        for start in range(answer.roots.start, answer.roots.stop, _ROOTS_AT_ONCE):
            roots = list(range(start, min(start + _ROOTS_AT_ONCE, answer.roots.stop)))
            yield model.draft(model.rows([answer.example], [roots])).final[0]

    return drafts_from_states(answer, states(), model.target.head_weight)
