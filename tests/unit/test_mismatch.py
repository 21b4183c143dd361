# SPDX-License-Identifier: Apache-2.0
"""What can go wrong in `scripts/mismatch.py` without a model: split, prompts, parts, page, and the sentences."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    import mismatch
    import mismatch_page
    import mismatch_text
    import mismatch_training
finally:
    sys.path.remove(str(SCRIPTS))

QUIET = Console(quiet=True)


def test_the_split_is_fixed_and_shares_no_paragraph() -> None:
    train, held_out = mismatch_text.split_topics()
    assert (train, held_out) == mismatch_text.split_topics()
    assert {"debugger", "lambda", "while"} < held_out.keys()
    assert train.keys().isdisjoint(held_out)
    known = mismatch_text.held_out_paragraphs(held_out)
    of_train = mismatch_text.held_out_paragraphs(train)
    assert len(known) > 100
    assert known.isdisjoint(of_train)
    sizes = [sum(map(len, part.values())) for part in (train, held_out)]
    assert 0.05 < sizes[1] / sum(sizes) < 0.2


def test_openings_stand_in_the_held_out_topics_and_are_spread() -> None:
    _, held_out = mismatch_text.split_topics()
    found = mismatch_text.openings(held_out, 12)
    assert len(found) == len({each["id"] for each in found}) == 12
    assert len({each["id"].rpartition("-")[0] for each in found}) >= 4
    for each in found:
        assert each["prompt"] in held_out[each["id"].rpartition("-")[0]]
        assert len(each["prompt"].split()) == mismatch_text.OPENING_WORDS
        assert each["kind"] == "prose"
    assert len(mismatch_text.openings(held_out, 10_000)) < 200


def test_every_prompt_comes_greedy_and_sampled() -> None:
    prompts = [
        {"id": "a", "kind": "chat", "prompt": "A"},
        {"id": "b", "kind": "code", "prompt": "B"},
    ]
    found = mismatch.twice(prompts)
    # `generate` gives even places temperature 0 and odd ones 0.8.
    assert [each["id"] for each in found] == ["a@0", "a@0.8", "b@0", "b@0.8"]
    assert found[1]["prompt"] == "A"


def test_prompts_with_held_out_text_are_known() -> None:
    paragraph = "This paragraph is one of the held-out topics and long enough to tell them apart."
    known = {paragraph, "Example:"}
    wrapped = paragraph.replace(" is", "\n  is")
    assert mismatch.quotes(f"Make this text shorter:\n\n{wrapped}", known)
    assert not mismatch.quotes("Example: write a haiku", known)


def test_a_finished_part_is_skipped(tmp_path: Path) -> None:
    made: list[str] = []
    result = tmp_path / "result"

    def make() -> None:
        made.append("once")
        result.touch()

    mismatch.Parts(tmp_path, {"limit": 3}, QUIET).run("part", result, make)
    again = mismatch.Parts(tmp_path, {"limit": 3}, QUIET)
    again.run("part", result, make)
    assert made == ["once"]
    assert again.minutes.keys() == {"part"}
    result.unlink()
    again.run("part", result, make)
    assert made == ["once", "once"]


def test_a_part_that_failed_is_not_finished(tmp_path: Path) -> None:
    result = tmp_path / "result"

    def fail() -> None:
        result.write_text("half")
        raise mismatch.MismatchError("stopped")

    with pytest.raises(mismatch.MismatchError):
        mismatch.Parts(tmp_path, {}, QUIET).run("part", result, fail)
    assert mismatch.Parts(tmp_path, {}, QUIET).minutes == {}


def test_other_options_need_another_folder(tmp_path: Path) -> None:
    mismatch.Parts(tmp_path, {"minutes": 6.0}, QUIET)
    with pytest.raises(mismatch.MismatchError, match=r"minutes \(6.0, now 1.0\): name another"):
        mismatch.Parts(tmp_path, {"minutes": 1.0}, QUIET)


def fail_half_way(folder: Path) -> None:
    with mismatch_training.whole_folder(folder) as part:
        (part / "half").touch()
        raise OSError("full")


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "target"
    with pytest.raises(OSError, match="full"):
        fail_half_way(folder)
    assert not folder.exists()
    with mismatch_training.whole_folder(folder) as part:
        (part / "all").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert [path.name for path in folder.iterdir()] == ["all"]


def record() -> dict[str, Any]:
    """Figures as `compare` gives them, each length another."""
    rows = []
    for number, (maps, target) in enumerate(mismatch_page.STUDIES):
        for domain in (mismatch_page.CHAT, mismatch_page.PROSE):
            for decoding in (mismatch_page.GREEDY, mismatch_page.SAMPLED):
                length = 2.0 + number / 10 + (domain == mismatch_page.PROSE) / 100
                rows.append(
                    {
                        "maps": maps,
                        "target": target,
                        "trained_for_this_target": number != 1,
                        "domain": domain,
                        "decoding": decoding,
                        "top1": 0.5,
                        "acceptance": {
                            "length": length,
                            "low": length - 0.1,
                            "high": length + 0.1,
                            "answers": 48,
                            "passes": 100,
                            "repeated": 0.07,
                        },
                    }
                )
    return {
        "command": "python scripts/mismatch.py",
        "cpu": "A CPU (avx2)",
        "threads": 2,
        "commit": "abc1234",
        "demo_maps": "0" * 8,
        "nodes": 16,
        "answer_tokens": 96,
        "minutes": {"further training": 6.04},
        "further_training": {
            "steps": 40,
            "tokens_per_step": 1024,
            "minutes": 6.0,
            "learning_rate": 1e-4,
            "perplexity_before": 12.0,
            "perplexity_after": 9.5,
        },
        "new_maps": {
            "steps": 200,
            "bigram_rank": 64,
            "bigram_steps": 50,
            "sequences_per_step": 8,
            "roots_per_sequence": 8,
            "examples": 400,
            "taught_tokens": 60000,
        },
        "refusal": "the maps were trained for other weights.",
        "rows": rows,
    }


def test_the_table_has_a_line_for_each_study_and_domain() -> None:
    lines = mismatch_page.table(record()["rows"]).splitlines()
    assert len(lines) == 2 + 6
    assert lines[4].startswith(
        "| demo maps | further trained (mismatch) | chat, code, editing | 2.10 (2.00 to 2.20) |"
    )
    assert lines[7] == (
        "| new maps | further trained (match) | Python docs prose | 2.21 (2.11 to 2.31) | 2.21 (2.11 to 2.31) "
        "| 7% / 7% | 50% / 50% |"
    )


def test_the_page_says_how_it_was_made() -> None:
    page = mismatch_page.page(record())
    for words in (
        "`python scripts/mismatch.py` on A CPU (avx2), 2 threads, commit abc1234",
        "closed-form start, then 50 of the bigram re-weighting, on 400 examples",
        "12.00 before, 9.50 after",
        '("the maps were trained for other weights") unless',
        "`allow_target_mismatch`",
        "| further training | 6.0 |",
    ):
        assert words in page.replace("\n  ", " ")
    assert max(len(line) for line in page.splitlines() if not line.startswith("|")) <= 120


def test_bad_input_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(mismatch.main)
    result = CliRunner().invoke(app, ["--target", "nowhere"])
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "mismatch: there is no nowhere/config.json: run `make target` and start this in the root of the checkout."
    ]


def test_maps_of_another_target_are_no_beginning(
    random_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.checkpoints import random_checkpoint
    from vllm_hidden_transfer.transfer import load_checkpoint, save_checkpoint

    monkeypatch.chdir(SCRIPTS.parent)
    maps = random_checkpoint(tmp_path / "maps", random_target)
    options = mismatch.Options(random_target, maps, tmp_path / "work", 1.0, 1.0, 40)
    layer, digest = mismatch._check(options)
    assert (layer, len(digest)) == (5, 8)
    config, weights = load_checkpoint(maps)
    other = config.target.model_copy(update={"fingerprint": "x"})
    shutil.rmtree(maps)
    save_checkpoint(maps, config.model_copy(update={"target": other}), weights)
    with pytest.raises(mismatch.MismatchError, match="trained for other weights"):
        mismatch._check(options)
