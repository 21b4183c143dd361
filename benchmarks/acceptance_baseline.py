# SPDX-License-Identifier: Apache-2.0
"""What the committed maps are worth on recorded answers: the figures that `make test` holds them to.

    python -m benchmarks.acceptance_baseline              # judge the recorded answers and write the figures anew
    python -m benchmarks.acceptance_baseline --answers    # first let stock vLLM answer anew

Answers are stock vLLM's to every sixth of the unseen prompts, at most 32 tokens each, greedily in fp32. They are walked
offline in fp32 with trees of 16 nodes, so the figures do not hang on the CPU: only two drafts that are as good as equal
may change places.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from vllm_hidden_transfer.checkpoint.maps import load_checkpoint
from vllm_hidden_transfer.drafting.lookup import SHARES
from vllm_hidden_transfer.drafting.vocabulary import DraftVocabulary
from vllm_hidden_transfer.evaluation.drafts import JudgedAnswer, draft
from vllm_hidden_transfer.evaluation.study import bigram_tables, judged_answers
from vllm_hidden_transfer.evaluation.walks import BigramDrafter, Drafter, OnePassDrafter, walk
from vllm_hidden_transfer.offline.cache import read_examples
from vllm_hidden_transfer.offline.prefixes import PrefixPasses
from vllm_hidden_transfer.offline.target import FrozenTarget
from vllm_hidden_transfer.training.generate import GenerateSettings, generate

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "examples/smollm2-135m"
PROMPTS = ROOT / "examples/prompts/unseen.jsonl"
ANSWERS = ROOT / "benchmarks/acceptance_baseline.jsonl"
BASELINE = ROOT / "benchmarks/acceptance_baseline.json"
CHECKPOINTS = {"shipped": "hidden_transfer", "published": "hidden_transfer/published"}
"""Folders of maps inside the target's."""
NODES = 16
EVERY, TOKENS = 6, 32
TOLERANCE = 0.03
"""Relative: of the acceptance length, and of the share of passes that accept at least so many tokens."""
ONE_PASS = 1.5
"""A pass more or less is no miss where only a handful get so far."""


class Worth(BaseModel):
    """What one checkpoint is worth on the recorded answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    passes: int
    length: float
    """Acceptance length: output tokens after the first, per decode pass."""
    reached: tuple[float, ...]
    """Share of passes that accept at least 1, 2, ... k draft tokens."""

    def misses(self, expected: Worth) -> list[str]:
        """What lies more than `TOLERANCE` from the expected figures, up or down; empty where nothing does.

        Better figures are a miss too: they are recorded anew, or nobody sees them lost again.
        """
        pairs = {"acceptance length": (self.length, expected.length)} | {
            f"passes that accept {depth} or more": pair
            for depth, pair in enumerate(zip(self.reached, expected.reached, strict=True), start=1)
        }
        return [
            f"{what}: {found:.4f}, and {wanted:.4f} is recorded"
            for what, (found, wanted) in pairs.items()
            if not math.isclose(
                found, wanted, rel_tol=TOLERANCE, abs_tol=ONE_PASS / expected.passes
            )
        ]


def recorded_answers() -> list[JudgedAnswer]:
    """The committed answers."""
    return judged_answers(read_examples(ANSWERS), TOKENS)


def expected() -> dict[str, Worth]:
    """The committed figures, by checkpoint."""
    return {name: Worth(**worth) for name, worth in json.loads(BASELINE.read_text()).items()}


def worth_of(
    checkpoint: Path, target: FrozenTarget, prefixes: PrefixPasses, answers: Sequence[JudgedAnswer]
) -> Worth:
    """Walk the answers with a checkpoint's trees.

    Args:
        checkpoint: a folder of one-pass maps that go where `target` begins.
        target: the target in fp32.
        prefixes: the target's states; what one checkpoint computed serves the next.
        answers: what to walk.
    """
    config, maps = load_checkpoint(checkpoint)
    maps = maps.float()
    vocabulary = DraftVocabulary.of(checkpoint, config)
    drafts = [
        draft(target, prefixes, maps, answer, on_path=False, vocabulary=vocabulary)
        for answer in answers
    ]
    temperatures = list(config.calibration.temperatures)
    drafter: Drafter = OnePassDrafter(drafts, temperatures, SHARES)
    if maps.bigram is not None:
        tables = bigram_tables(target, maps.bigram)
        drafter = BigramDrafter(drafts, tables, temperatures, SHARES)
    walks = walk([answer.tokens for answer in answers], drafter, NODES)
    accepted = [depth for one in walks for depth in one.accepted]
    return Worth(
        passes=len(accepted),
        length=round(sum(one.decoded for one in walks) / len(accepted), 4),
        reached=tuple(
            round(sum(depth >= least for depth in accepted) / len(accepted), 4)
            for least in range(1, drafter.depths + 1)
        ),
    )


def judge_all() -> dict[str, Worth]:
    """The worth of every checkpoint on the committed answers."""
    answers = recorded_answers()
    config, _ = load_checkpoint(TARGET / CHECKPOINTS["shipped"])
    target = FrozenTarget.load(TARGET, config.transfer_layer)
    prefixes = PrefixPasses(target, len(answers))
    return {
        name: worth_of(TARGET / folder, target, prefixes, answers)
        for name, folder in CHECKPOINTS.items()
    }


def answer_anew(console: Console) -> None:
    """Let stock vLLM answer the prompts and replace the committed answers."""
    with TemporaryDirectory() as name:
        prompts, output = Path(name) / "prompts.jsonl", Path(name) / "answers.jsonl"
        prompts.write_text("\n".join(PROMPTS.read_text().splitlines()[::EVERY]) + "\n")
        settings = GenerateSettings(
            target=str(TARGET),
            prompts=(prompts,),
            output=output,
            temperatures=(0.0,),
            max_tokens=TOKENS,
            dtype="float32",
        )
        generate(settings, console)
        ANSWERS.write_text(output.read_text())


def main(
    answers: Annotated[bool, typer.Option("--answers", help="Answer the prompts anew.")] = False,
) -> None:
    """Write the figures that the committed maps are held to."""
    console = Console(highlight=False)
    if answers:
        answer_anew(console)
    found = {name: worth.model_dump() for name, worth in judge_all().items()}
    BASELINE.write_text(json.dumps(found, indent=1) + "\n")
    console.print_json(data=found)


if __name__ == "__main__":
    typer.run(main)
