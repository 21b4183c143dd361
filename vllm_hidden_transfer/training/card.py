# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: the checkpoint with its calibration, figures, pictures, command, log and model card."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from vllm_hidden_transfer.checkpoint.config import (
    Calibration,
    SpeculatorsConfig,
    Target,
    TransferConfig,
    Tree,
    Verifier,
)
from vllm_hidden_transfer.checkpoint.maps import TransferMaps, save_checkpoint, write_atomically
from vllm_hidden_transfer.drafting.lookup import SHARES
from vllm_hidden_transfer.evaluation.calibration import fit_temperatures
from vllm_hidden_transfer.evaluation.preparation import progress_bar
from vllm_hidden_transfer.evaluation.study import (
    OPENING_TOKENS,
    Judged,
    draft_with_maps,
    judge,
    judged_answers,
    maps_drafter,
    provenance,
)
from vllm_hidden_transfer.evaluation.study_plots import draw_study
from vllm_hidden_transfer.evaluation.study_report import study_grids
from vllm_hidden_transfer.evaluation.study_result import STUDY_FILE, Study
from vllm_hidden_transfer.evaluation.walks import walk
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.prefixes import Prefixes
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.training.bigram import bigram_folder
from vllm_hidden_transfer.training.settings import TrainSettings
from vllm_hidden_transfer.training.trainer import LOG_FILE, Trainer

JUDGED_TOKENS = 96
FORMS = {
    "token": "`W_i h + U_i emb(x)`, x the token just sampled",
    "none": "`W_i h`, as published",
    "chained": "`W_i h + U_i emb(x_i)`, x_i the token at the step's own place on the path",
}


@dataclass(frozen=True)
class RunFacts:
    """What the card says about a run beside its figures."""

    command: str
    fingerprint: str
    folder: Path
    """The target's."""
    answers: int
    taught_tokens: int
    minutes: float
    """Of this sitting."""
    corpus_digest: str


def stored_maps(maps: TransferMaps) -> TransferMaps:
    """The maps as they will be stored, rounded to bf16, in fp32 for judging."""
    copy = TransferMaps(
        maps.num_steps, maps.hidden_size, maps.conditioning, bigram_rank=maps.bigram_rank
    )
    copy.load_state_dict(
        {name: tensor.bfloat16().float().cpu() for name, tensor in maps.state_dict().items()}
    )
    return copy.requires_grad_(False)


def acceptance_of(
    target: FrozenTarget, prefixes: Prefixes, maps: TransferMaps, examples: list[Example]
) -> float:
    """Acceptance length with trees of the default size, calibrated on the same examples."""
    answers = judged_answers(examples, JUDGED_TOKENS)
    with Progress(disable=True) as progress:
        drafts = draft_with_maps(target, prefixes, stored_maps(maps), answers, progress)
    drafter = maps_drafter(target, prefixes, stored_maps(maps), drafts, fit_temperatures(drafts))
    walks = walk([answer.tokens for answer in answers], drafter, Tree().node_budget)
    return sum(each.decoded for each in walks) / sum(each.passes for each in walks)


def export(
    settings: TrainSettings,
    trainer: Trainer,
    held_out: list[Example],
    facts: RunFacts,
    console: Console,
) -> None:
    """Calibrate and judge on held-out examples, and write the whole folder."""
    target, prefixes, maps = trainer.target, trainer.cache, stored_maps(trainer.maps)
    answers = judged_answers(held_out, JUDGED_TOKENS)
    with progress_bar(console) as progress:
        drafts = draft_with_maps(target, prefixes, maps, answers, progress)
        temperatures = fit_temperatures(drafts)
        config = _config(settings, target, maps, temperatures, facts.fingerprint)
        output = settings.output
        save_checkpoint(output, config, maps)
        drafter = maps_drafter(target, prefixes, maps, drafts, temperatures, shares=SHARES)
        groups = judge(Judged(drafts, drafter, temperatures), config.tree.node_budget, progress)
    study = Study(
        provenance=provenance(
            facts.command, facts.folder, facts.fingerprint, output, True, answers
        ),
        conditioning=maps.conditioning,
        num_transfer_steps=maps.num_steps,
        transfer_layer=target.transfer_layer,
        temperatures=temperatures,
        node_budget=config.tree.node_budget,
        max_tokens=JUDGED_TOKENS,
        opening_tokens=OPENING_TOKENS,
        groups=groups,
    )
    log = (trainer.folder / LOG_FILE).read_text()
    records = [json.loads(line) for line in log.splitlines()]
    write_atomically(output / STUDY_FILE, (study.model_dump_json(indent=1) + "\n").encode())
    write_atomically(output / "train_command.txt", f"{facts.command}\n".encode())
    write_atomically(output / "training_log.jsonl", log.encode())
    pictures = [*draw_study(study, output), _draw_loss(records, output)]
    card = _card(settings, config, study, records, facts, pictures)
    card += _about_bigrams(bigram_folder(trainer.folder), config.bigram_rank)
    write_atomically(output / "README.md", card.encode())
    for grid in study_grids(study):
        console.print(grid.rich())


def corpus_digest(examples: list[Example]) -> str:
    """sha256 over the token ids of all examples, its first 16 digits."""
    return hashlib.sha256("".join(example.digest for example in examples).encode()).hexdigest()[:16]


def _config(
    settings: TrainSettings,
    target: FrozenTarget,
    maps: TransferMaps,
    temperatures: list[float],
    fingerprint: str,
) -> TransferConfig:
    verifier = Verifier(name_or_path=_name(settings), architectures=tuple(target.architectures))
    return TransferConfig(
        speculators_config=SpeculatorsConfig(verifier=verifier),
        num_transfer_steps=maps.num_steps,
        transfer_layer_ids=(target.transfer_layer,),
        conditioning=maps.conditioning,
        bigram_rank=maps.bigram_rank,
        held_out_by="content",
        calibration=Calibration(temperatures=tuple(temperatures)),
        target=Target(
            hidden_size=target.hidden_size,
            num_hidden_layers=target.num_layers,
            vocab_size=target.vocab_size,
            fingerprint=fingerprint,
        ),
    )


def _name(settings: TrainSettings) -> str:
    """The target's name for people: a path of this machine says nothing elsewhere."""
    if settings.name:
        return settings.name
    return Path(settings.target).name if Path(settings.target).is_dir() else settings.target


def _draw_loss(records: list[dict[str, Any]], folder: Path) -> str:
    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    steps = [record["step"] for record in records]
    for depth in range(len(records[0]["kl"])):
        values = [record["kl"][depth] for record in records]
        axes.plot(steps, values, linewidth=1.0, label=f"depth {depth + 1}")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("KL to the target, nats")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False)
    figure.savefig(folder / "loss.png", dpi=110)
    return "loss.png"


def _about_bigrams(folder: Path, rank: int) -> str:
    """A line of the card; nothing where there is no re-weighting."""
    if not rank:
        return ""
    last = json.loads((folder / LOG_FILE).read_text().splitlines()[-1])
    return (
        f"- Bigram re-weighting of rank {rank} (what a drafted token says about the one after it): {last['step']} more "
        f"steps with\n  the maps as they are; last logged KL by depth, given the token before, {last['kl']}.\n"
    )


def _card(
    settings: TrainSettings,
    config: TransferConfig,
    study: Study,
    records: list[dict[str, Any]],
    facts: RunFacts,
    pictures: list[str],
) -> str:
    name, last = _name(settings), records[-1]
    grids = "\n\n".join(grid.markdown() for grid in study_grids(study))
    images = "\n".join(f"![{Path(each).stem.replace('_', ' ')}]({each})" for each in pictures)
    versions = ", ".join(
        f"{package} {version}" for package, version in study.provenance.versions.items()
    )
    tuned = settings.training().model_dump()
    return f"""---
base_model: {name}
tags: [speculative-decoding, hidden-transfer]
---

# Hidden-transfer maps for {name}

{FORMS[config.conditioning]}; k = {config.num_transfer_steps}, transfer layer {config.transfer_layer} of
{config.target.num_hidden_layers} (hidden transfer, arXiv 2404.12022). They fit one set of weights, whose fingerprint is
in `config.json`. Made by

    {facts.command}

{grids}

Judged offline on held-out examples of the training data (first {study.max_tokens} output tokens), which also gave the
softmax temperatures in `config.json`: figures on other prompts will differ.

{images}

- Data: {facts.answers} examples, {facts.taught_tokens} tokens to learn; sha256 over its token ids
  `{facts.corpus_digest}...`.
- Method: closed-form ridge start, then AdamW on the KL to the frozen target's own distribution, depth i weighted by
  {settings.step_decay:g}^i. Last logged KL by depth {last["kl"]} (weighted {last["loss"]}), top-1 agreement with the
  target {last["agreement"]}.
- Settings: `{json.dumps(tuned)}`
- {study.provenance.machine}, {versions}; target in {settings.dtype}, maps trained in float32, stored as bf16; the last
  sitting took {facts.minutes:.0f} minutes.
"""
