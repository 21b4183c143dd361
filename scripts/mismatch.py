# SPDX-License-Identifier: Apache-2.0
"""What a mismatch costs: the demo maps on a target that was further trained on other text, with and without new maps.

    python scripts/mismatch.py

The demo target is trained on the prose of ``pydoc_data.topics`` for some minutes. Both targets answer the unseen
prompts and continue held-out topics, greedily and at temperature 0.8. The shipped maps are judged on the answers of
both, maps made for the further-trained target on its own. Run it in the root of the checkout. A part whose result
exists is skipped, so an interrupted run goes on. The second target stays in the work folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from demo_prompts import training_prompts
from mismatch_page import CHAT, DEMO, FURTHER, GREEDY, ORIGINAL, PROSE, SAMPLED, STUDIES, page
from mismatch_text import held_out_paragraphs, openings, split_topics, squeezed
from mismatch_training import (
    LEARNING_RATE,
    WINDOW,
    WINDOWS,
    descend,
    perplexity,
    whole_folder,
    windows,
)
from rich.console import Console
from rich.markdown import Markdown
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_hidden_transfer.config import one_sentence
from vllm_hidden_transfer.evaluation.machine import this_commit, this_machine
from vllm_hidden_transfer.evaluation.preparation import (
    JudgingError,
    Prepared,
    Request,
    prepare,
    progress_bar,
)
from vllm_hidden_transfer.evaluation.study import draft_with_maps, maps_drafter, measured
from vllm_hidden_transfer.evaluation.walks import walk
from vllm_hidden_transfer.fingerprint import FingerprintError, fingerprint_target
from vllm_hidden_transfer.training.parallel import Processes
from vllm_hidden_transfer.training.rows import DataError
from vllm_hidden_transfer.training.run import prefixes_of, read_data
from vllm_hidden_transfer.training.settings import TrainSettings
from vllm_hidden_transfer.training.target import FrozenTarget
from vllm_hidden_transfer.training.trainer import Trainer
from vllm_hidden_transfer.transfer import (
    WEIGHTS_FILE,
    CheckpointError,
    TransferMaps,
    load_checkpoint,
    write_atomically,
)

UNSEEN = Path("examples/prompts/unseen.jsonl")
SEED = 20261121
NODES = 16
ANSWER_TOKENS = 96
TRAINING_ANSWER_TOKENS = 128
OPENINGS = 32
SPARE_PROMPTS = 100
"""More training prompts than are wanted: the ones that quote held-out topics are left out."""
FOR_TRAINING = 0.7
"""Share of the time left after the prefix cache for optimiser steps; ridge start and calibration take the rest."""
MAPS_SHARE = 0.8
"""Share of these for the maps; the bigram re-weighting, where the demo maps have one, gets the others."""


class MismatchError(Exception):
    """The comparison cannot go on; the message is one sentence."""

    def __init__(self, message: object) -> None:
        super().__init__(one_sentence(str(message).rstrip(".")) + ".")


@dataclass(frozen=True)
class Options:
    """What the user named."""

    target: Path
    maps: Path
    work: Path
    minutes: float
    train_minutes: float
    limit: int

    def folder(self, target: str) -> Path:
        """Where a target lies."""
        return self.target if target == ORIGINAL else self.work / "target"

    def answers(self, target: str, domain: str) -> Path:
        """The answers of a target to the prompts of a domain."""
        return self.work / f"answers-{_slug(target)}-{_slug(domain)}.jsonl"


class Parts:
    """Which parts are finished, and the minutes that each took; kept in the work folder."""

    def __init__(self, work: Path, options: dict[str, Any], console: Console) -> None:
        self._file, self._options, self._console = work / "parts.json", options, console
        self.minutes: dict[str, float] = {}
        if self._file.exists():
            found = json.loads(self._file.read_text(encoding="utf-8"))
            for name, now in options.items():
                before = found["options"].get(name)
                if before != now:
                    raise MismatchError(
                        f"{work} was begun with another {name} ({before}, now {now}): name another --work"
                    )
            self.minutes = found["minutes"]
        work.mkdir(parents=True, exist_ok=True)
        self._save()

    def run(self, name: str, result: Path, make: Callable[[], None]) -> None:
        """Make a part unless its result is there and was finished."""
        if name in self.minutes and result.exists():
            self._console.print(f"{name}: done before")
            return
        self._console.rule(name)
        started = time.monotonic()
        make()
        self.minutes[name] = round((time.monotonic() - started) / 60, 2)
        self._save()

    def _save(self) -> None:
        found = {"options": self._options, "minutes": self.minutes}
        write_json(self._file, found)


def main(
    target: Annotated[Path, typer.Option(help="Folder of the target.")] = Path(
        "examples/smollm2-135m"
    ),
    maps: Annotated[
        Path | None,
        typer.Option(help="Its maps.", show_default="hidden_transfer in the target's folder"),
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Minutes of further training of the target.", min=0.01)
    ] = 6,
    train_minutes: Annotated[
        float,
        typer.Option(help="Minutes for new maps, from the prefix cache to the study.", min=0.01),
    ] = 9,
    limit: Annotated[
        int, typer.Option(help="Training prompts that the new maps learn from.", min=40, max=2000)
    ] = 300,
    work: Annotated[Path, typer.Option(help="Folder of all parts.")] = Path("work/mismatch"),
    output: Annotated[Path, typer.Option(help="The table; the figures lie beside as .json.")] = (
        Path("benchmarks/mismatch.md")
    ),
) -> None:
    """Make all parts that are missing, and write the table."""
    console = Console(highlight=False)
    options = Options(
        target, maps or target / "hidden_transfer", work, minutes, train_minutes, limit
    )
    try:
        record = compare(options, console)
        text = page(record)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output.with_suffix(".json"), record)
        write_atomically(output, text.encode())
    except (MismatchError, JudgingError, DataError, CheckpointError, FingerprintError) as error:
        typer.echo(f"mismatch: {error}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"mismatch: {error.filename}: {error.strerror or error}", err=True)
        raise typer.Exit(1) from None
    console.print(Markdown(text))


def compare(options: Options, console: Console) -> dict[str, Any]:
    """All parts, and what they found."""
    layer, digest = _check(options)
    work = options.work
    asked = {
        "minutes": options.minutes,
        "train minutes": options.train_minutes,
        "limit": options.limit,
        "target": fingerprint_target(options.target),
    }
    parts = Parts(work, asked, console)
    write_texts(options)
    parts.run("further training", work / "target", lambda: further_train(options, console))
    about = json.loads((work / "target/further_training.json").read_text(encoding="utf-8"))
    for target in (ORIGINAL, FURTHER):
        for domain in (CHAT, PROSE):
            found = options.answers(target, domain)
            parts.run(
                f"answers, {target}, {domain}",
                found,
                lambda t=target, d=domain: write_answers(options, t, d),  # type: ignore[misc]
            )
    answers = work / "answers-training.jsonl"
    parts.run("answers to train on", answers, lambda: write_training_answers(options, answers))
    new_maps = work / f"maps-{layer}"
    parts.run(
        "new maps", new_maps / "README.md", lambda: train_maps(options, layer, answers, console)
    )
    rows = []
    for maps, target in STUDIES:
        folder = options.maps if maps == DEMO else new_maps
        result = work / f"judged-{_slug(maps)}-{_slug(target)}-{digest}.json"
        parts.run(
            f"judging, {maps}, {target}",
            result,
            lambda m=maps, t=target, f=folder, r=result: write_json(  # type: ignore[misc]
                r, judge_maps(options, m, t, f, console)
            ),
        )
        rows += json.loads(result.read_text(encoding="utf-8"))
    machine = this_machine()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "cpu": str(machine),
        "threads": torch.get_num_threads(),
        "commit": this_commit(),
        "demo_maps": digest,
        "nodes": NODES,
        "answer_tokens": ANSWER_TOKENS,
        "minutes": parts.minutes,
        "further_training": about,
        "new_maps": json.loads((work / f"plan-{layer}.json").read_text(encoding="utf-8")),
        "refusal": refusal(options),
        "rows": rows,
    }


def _check(options: Options) -> tuple[int, str]:
    """The demo maps' layer and the digest of their weights, when all input is there.

    Raises:
        MismatchError: it is not.
    """
    for path in (options.target / "config.json", UNSEEN):
        if not path.is_file():
            raise MismatchError(
                f"there is no {path}: run `make target` and start this in the root of the checkout"
            )
    config, _ = load_checkpoint(options.maps)
    if config.target.fingerprint != fingerprint_target(options.target):
        raise MismatchError(
            f"the maps {options.maps} were trained for other weights than those of {options.target}: "
            "begin with maps that fit"
        )
    digest = hashlib.sha256((options.maps / WEIGHTS_FILE).read_bytes()).hexdigest()[:8]
    return config.transfer_layer, digest


# The texts


def write_texts(options: Options) -> None:
    """Topics and all prompts, as files that `generate` and `train` read."""
    train, held_out = split_topics()
    unseen = [json.loads(line) for line in UNSEEN.read_text(encoding="utf-8").splitlines()]
    known = held_out_paragraphs(held_out)
    training = [
        {"id": prompt.id, "kind": prompt.kind, "prompt": prompt.text}
        for prompt in training_prompts(options.limit + SPARE_PROMPTS, SEED)
        if not quotes(prompt.text, known)
    ]
    for name, rows in {
        "topics-train": [{"text": text} for text in train.values()],
        "topics-held-out": [{"text": text} for text in held_out.values()],
        f"prompts-{_slug(CHAT)}": twice(unseen),
        f"prompts-{_slug(PROSE)}": twice(openings(held_out, OPENINGS)),
        "prompts-training": training[: options.limit],
    }.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(options.work / f"{name}.jsonl", lines.encode())


def twice(prompts: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Every prompt two times in a row: `generate` answers even ones greedily and odd ones at 0.8."""
    return [{**prompt, "id": f"{prompt['id']}@{way}"} for prompt in prompts for way in ("0", "0.8")]


def quotes(text: str, paragraphs: set[str]) -> bool:
    """Whether a prompt holds one of the paragraphs; very short ones say nothing."""
    whole = squeezed(text)
    return any(len(each) > 60 and each in whole for each in paragraphs)


# The further-trained target


def further_train(options: Options, console: Console) -> None:
    """Train all weights on the topics for some minutes; the folder appears when it is complete."""
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    train = windows(options.work / "topics-train.jsonl", tokenizer)
    held_out = windows(options.work / "topics-held-out.jsonl", tokenizer)
    full = [window for window in train if len(window) == WINDOW]
    model = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.float32)
    before = perplexity(model, held_out)
    console.print(f"perplexity of held-out topics before: {before:.2f}")
    started = time.monotonic()
    losses = descend(model, full, 60 * options.minutes, console)
    minutes = (time.monotonic() - started) / 60
    after = perplexity(model, held_out)
    console.print(f"perplexity of held-out topics after {len(losses)} steps: {after:.2f}")
    about = {
        "steps": len(losses),
        "minutes": round(minutes, 2),
        "tokens_per_step": WINDOW * WINDOWS,
        "training_tokens": sum(map(len, train)),
        "held_out_tokens": sum(map(len, held_out)),
        "learning_rate": LEARNING_RATE,
        "perplexity_before": round(before, 3),
        "perplexity_after": round(after, 3),
        "losses": [round(loss, 4) for loss in losses],
    }
    with whole_folder(options.work / "target") as folder:
        for path in options.target.iterdir():
            if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
                shutil.copy(path, folder)
        model.save_pretrained(folder)
        write_json(folder / "further_training.json", about)


# Answers


def write_answers(options: Options, target: str, domain: str) -> None:
    """One file of a target's answers to the prompts of a domain, each greedy and sampled."""
    folder = options.folder(target)
    if domain == PROSE:
        view = options.work / f"plain-{_slug(target)}"
        plain_view(folder, view)
        folder = view
    prompts = options.work / f"prompts-{_slug(domain)}.jsonl"
    generate(folder, prompts, options.answers(target, domain), ANSWER_TOKENS)


def write_training_answers(options: Options, output: Path) -> None:
    """The further-trained target's answers to the demo's training prompts, half of them greedy."""
    prompts = options.work / "prompts-training.jsonl"
    generate(options.folder(FURTHER), prompts, output, TRAINING_ANSWER_TOKENS)


def generate(target: Path, prompts: Path, output: Path, max_tokens: int) -> None:
    """Stock vLLM in a process of its own: there cannot be two engines in one."""
    run_command(
        "generate",
        *("--target", str(target), "--prompts", str(prompts), "--output", str(output)),
        *("--dtype", "float32", "--max-tokens", str(max_tokens), "--seed", str(SEED)),
    )


def plain_view(target: Path, folder: Path) -> None:
    """The same weights without a chat template: `generate` continues prompts as they are."""
    with whole_folder(folder) as view:
        tokenizer = AutoTokenizer.from_pretrained(target)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(view)
        for path in [*target.glob("*.safetensors"), *target.glob("*config.json")]:
            if not (view / path.name).exists():
                (view / path.name).symlink_to(path.resolve())


def run_command(*arguments: str) -> None:
    """`vllm-hidden-transfer` with these arguments.

    Raises:
        MismatchError: it failed, and has said why.
    """
    command = [sys.executable, "-m", "vllm_hidden_transfer", *arguments]
    if subprocess.run(command, check=False).returncode:
        raise MismatchError(
            f"`vllm-hidden-transfer {shlex.join(arguments)}` failed, see above; this script goes on from there"
        )


# New maps


def train_maps(options: Options, layer: int, answers: Path, console: Console) -> None:
    """`train` for the further-trained target, with as many steps as fit into the time."""
    plan = options.work / f"plan-{layer}.json"
    config, _ = load_checkpoint(options.maps)
    settings = TrainSettings(
        target=str(options.folder(FURTHER)),
        data=[answers, options.work / "topics-train.jsonl"],
        output=options.work / f"maps-{layer}",
        work=options.work / "train",
        own_share=0.5,
        max_tokens=512,
        conditioning=config.conditioning,
        transfer_layer=layer,
        transfer_steps=config.num_transfer_steps,
        bigram_rank=config.bigram_rank,
        sequences=8,
        roots=8,
        learning_rate=8e-4,
        judged=20,
        name=f"{options.target.name}, further trained",
    )
    if not plan.exists():  # a run that goes on must keep its steps
        write_json(plan, plan_training(settings, options.train_minutes, console))
    planned = json.loads(plan.read_text(encoding="utf-8"))
    given = settings.model_dump(mode="json", exclude_unset=True)
    given |= {name: planned[name] for name in ("steps", "bigram_steps")}
    path = options.work / f"train-{layer}.yaml"
    write_atomically(path, yaml.safe_dump(given).encode())
    run_command("train", "--config", str(path))


def plan_training(settings: TrainSettings, minutes: float, console: Console) -> dict[str, Any]:
    """Fill the prefix cache, time three steps, and say how many fit into what is left."""
    started = time.monotonic()
    corpus = read_data(settings, console)
    assert isinstance(settings.transfer_layer, int)
    target = FrozenTarget.load(settings.target, settings.transfer_layer)
    fingerprint = fingerprint_target(settings.target)
    prefixes = prefixes_of(settings, target, corpus, fingerprint, Processes(), console)
    cached = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        maps = TransferMaps(settings.transfer_steps, target.hidden_size, settings.conditioning)
        trainer = Trainer(target, prefixes, corpus.train, maps, settings.training(), folder)
        for _ in range(3):
            trainer.train_step()
    step = (time.monotonic() - cached) / 3
    left = 60 * minutes - (time.monotonic() - started)
    steps = max(20, int(FOR_TRAINING * left / step))
    maps_steps = int(MAPS_SHARE * steps) if settings.bigram_rank else steps
    return {
        "steps": maps_steps,
        "bigram_rank": settings.bigram_rank,
        "bigram_steps": max(1, steps - maps_steps),
        "sequences_per_step": settings.sequences,
        "roots_per_sequence": settings.roots,
        "examples": len(corpus.train),
        "taught_tokens": corpus.taught_tokens,
        "seconds_per_step": round(step, 3),
    }


# Judging


def judge_maps(
    options: Options, maps: str, target: str, folder: Path, console: Console
) -> list[dict[str, Any]]:
    """Acceptance by domain and decoding, of maps on a target's own answers; walks of `NODES` nodes."""
    config, _ = load_checkpoint(folder)
    request = Request(
        target=options.folder(target),
        checkpoint=folder,
        data=[options.answers(target, domain) for domain in (CHAT, PROSE)],
        cache=options.work / f"prefixes-{_slug(target)}-{config.transfer_layer}",
        max_tokens=ANSWER_TOKENS,
        limit=1000,
        held_out=False,
        # What `eval` calls --allow-target-mismatch: here it is the question.
        allow_target_mismatch=True,
    )
    with progress_bar(console) as progress:
        prepared = prepare(request, console, progress)
        parts = (prepared.target, prepared.prefixes, prepared.maps)
        drafts = draft_with_maps(*parts, prepared.answers, progress)
    temperatures = list(config.calibration.temperatures)
    walks = walk(
        [answer.tokens for answer in prepared.answers],
        maps_drafter(*parts, drafts, temperatures),
        NODES,
    )
    rows = []
    for (domain, decoding), members in _groups(prepared).items():
        ranks = [rank for at in members for rank in drafts[at].ranks[:, 0].tolist() if rank >= 0]
        found = measured(
            [walks[at] for at in members], [prepared.answers[at].tokens for at in members]
        )
        rows.append(
            {
                "maps": maps,
                "target": target,
                "trained_for_this_target": prepared.trained_for_this_target,
                "domain": domain,
                "decoding": decoding,
                "top1": round(ranks.count(0) / max(len(ranks), 1), 4),
                "acceptance": found.model_dump(),
            }
        )
    return rows


def _groups(prepared: Prepared) -> dict[tuple[str, str], list[int]]:
    """Numbers of the judged answers by domain and decoding."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, answer in enumerate(prepared.answers):
        domain = PROSE if answer.example.kind == "prose" else CHAT
        decoding = SAMPLED if answer.example.temperature else GREEDY
        groups.setdefault((domain, decoding), []).append(number)
    return groups


def refusal(options: Options) -> str:
    """What vLLM says when it shall serve the mismatch; with the override it must take it.

    Raises:
        MismatchError: the engine behaves otherwise.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.engine.arg_utils import EngineArgs

    def configure(**more: bool) -> None:
        method = {"method": "hidden_transfer", "model": str(options.maps), **more}
        model = str(options.folder(FURTHER))
        EngineArgs(model=model, dtype="float32", speculative_config=method).create_engine_config()

    try:
        configure()
    except ValueError as error:
        said = str(error)
    else:
        raise MismatchError("the engine took maps of another target without being told to")
    if "allow_target_mismatch" not in said:
        raise MismatchError(f"the engine refused the mismatch for another reason: {said}")
    try:
        configure(allow_target_mismatch=True)
    except ValueError as error:
        raise MismatchError(
            f"the engine refused the mismatch in spite of the override: {error}"
        ) from error
    return said


def write_json(path: Path, found: Any) -> None:
    """JSON, all or nothing."""
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-").lower()


if __name__ == "__main__":
    typer.run(main)
