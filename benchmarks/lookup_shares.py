# SPDX-License-Identifier: Apache-2.0
"""Fit how far prompt lookup is trusted beside the shipped maps: the table in ``drafting/lookup.py``.

    python scripts/make_demo_data.py --count 240 --answer-tokens 128 --output work/lookup_data.jsonl
    python -m benchmarks.lookup_shares work/lookup_data.jsonl   # takes 20 minutes

The answers are the target's own to training prompts, half of them greedy and half sampled at 0.8; no judged prompt is
among them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import track

from vllm_hidden_transfer.checkpoint.maps import load_checkpoint
from vllm_hidden_transfer.drafting.lookup import LONGEST_MATCH
from vllm_hidden_transfer.evaluation.drafts import draft
from vllm_hidden_transfer.evaluation.lookup_shares import Seen, fit_shares, seen
from vllm_hidden_transfer.evaluation.study import bigram_tables, judged_answers
from vllm_hidden_transfer.evaluation.walks import BigramDrafter, Place
from vllm_hidden_transfer.offline.cache import read_examples
from vllm_hidden_transfer.offline.prefixes import PrefixPasses
from vllm_hidden_transfer.offline.target import FrozenTarget

TARGET = Path(__file__).parents[1] / "examples/smollm2-135m"
TOKENS = 128


def main(
    data: Annotated[Path, typer.Argument(help="answers that `generate` wrote")],
) -> None:
    """Print the shares by length of the match (rows) and depth (columns)."""
    config, maps = load_checkpoint(TARGET / "hidden_transfer")
    target = FrozenTarget.load(TARGET, config.transfer_layer)
    answers = judged_answers(read_examples(data), TOKENS)
    prefixes, maps = PrefixPasses(target, 1), maps.float()
    assert maps.bigram is not None
    tables = bigram_tables(target, maps.bigram)
    temperatures = list(config.calibration.temperatures)
    observed: list[Seen] = []
    for answer in track(answers, description="drafting"):
        drafts = [draft(target, prefixes, maps, answer, on_path=False)]
        drafter = BigramDrafter(drafts, tables, temperatures)
        places = [Place(0, known) for known in range(1, len(answer.tokens))]
        observed += seen(answer, places, drafter.candidates(places))
    matches = Counter(one.match for one in observed if one.depth == 0)
    print(f"{len(answers)} answers, copies by length of the match:", sorted(matches.items()))
    with np.printoptions(precision=2, suppress=True):
        print(fit_shares(observed))
    assert set(matches) <= set(range(1, LONGEST_MATCH + 1))


if __name__ == "__main__":
    typer.run(main)
