# SPDX-License-Identifier: Apache-2.0
"""The page that `mismatch.py` writes, from its figures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from vllm_hidden_transfer.evaluation.study_result import Length

GREEDY, SAMPLED = "greedy", "temperature 0.8"
CHAT, PROSE = "chat, code, editing", "Python docs prose"
ORIGINAL, FURTHER = "original", "further trained"
DEMO, NEW = "demo maps", "new maps"
STUDIES = ((DEMO, ORIGINAL), (DEMO, FURTHER), (NEW, FURTHER))
"""Maps, and the target whose answers judge them."""


def page(record: dict[str, Any]) -> str:
    """The whole page in markdown."""
    parts = "\n".join(f"| {name} | {took:.1f} |" for name, took in record["minutes"].items())
    points = [
        _further_training(record["further_training"]),
        _new_maps(record["new_maps"]),
        f'The engine refuses the mismatch ("{record["refusal"].rstrip(".")}") unless `allow_target_mismatch` is true '
        "in `--speculative-config`; for `eval` and `tune` that is `--allow-target-mismatch`.",
    ]
    notes = "\n".join(_filled(f"- {point}", "  ") for point in points)
    return f"""# What a mismatch costs

`{record["command"]}` on {record["cpu"]}, {record["threads"]} threads, commit {record["commit"]}.

{table(record["rows"])}

{_filled(_reading(record))}

{notes}

Minutes of the parts (of one that was interrupted: of the sitting that finished it):

| part | minutes |
|---|---|
{parts}
"""


def _reading(record: dict[str, Any]) -> str:
    answers = {row["domain"]: row["acceptance"]["answers"] for row in record["rows"]}
    return (
        "Acceptance length: output tokens after the first per decode pass, with 95% bootstrap intervals over answers; "
        "1.00 is no speculation. Judged on the target's own answers, walked offline with trees of "
        f"{record['nodes']} nodes, at most {record['answer_tokens']} output tokens each: {answers[CHAT]} unseen "
        f"prompts of chat, code and editing, and {answers[PROSE]} openings of held-out topics of `pydoc_data.topics`, "
        "continued. The last two columns: greedy / temperature 0.8."
    )


def _further_training(about: dict[str, Any]) -> str:
    before, after = about["perplexity_before"], about["perplexity_after"]
    return (
        "The further-trained target: the original with all weights trained on the other topics, "
        f"{about['steps']} steps of {about['tokens_per_step']} tokens in {about['minutes']:.1f} minutes, AdamW at "
        f"{about['learning_rate']:g}, fp32. Perplexity of the held-out topics: {before:.2f} before, {after:.2f} "
        "after. It is not committed."
    )


def _new_maps(new: dict[str, Any]) -> str:
    bigram = (
        f", then {new['bigram_steps']} of the bigram re-weighting" if new["bigram_rank"] else ""
    )
    return (
        f"The new maps, of the same form: {new['steps']} steps of {new['sequences_per_step']} sequences x "
        f"{new['roots_per_sequence']} roots after the closed-form start{bigram}, on {new['examples']} examples "
        f"({new['taught_tokens']} tokens to learn), half of them the further-trained target's own answers to other "
        "prompts, half text of the other topics. The demo maps had more answers and steps."
    )


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for maps, target and domain, in the order of `STUDIES`."""
    found = {(row["maps"], row["target"], row["domain"], row["decoding"]): row for row in rows}
    header = ["maps", "target", "domain", GREEDY, SAMPLED, "repeated 4-grams", "top 1 at depth 1"]
    lines = [header, ["---"] * len(header)]
    for maps, target in STUDIES:
        for domain in (CHAT, PROSE):
            pair = [found[maps, target, domain, decoding] for decoding in (GREEDY, SAMPLED)]
            lengths = [Length.model_validate(row["acceptance"]) for row in pair]
            fit = "match" if pair[0]["trained_for_this_target"] else "mismatch"
            lines.append(
                [
                    maps,
                    f"{target} ({fit})",
                    domain,
                    *map(str, lengths),
                    " / ".join(f"{length.repeated:.0%}" for length in lengths),
                    " / ".join(f"{row['top1']:.0%}" for row in pair),
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
