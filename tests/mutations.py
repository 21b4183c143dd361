# SPDX-License-Identifier: Apache-2.0
"""Planted errors, each of which a named test must catch: ``make mutations`` or ``python -m tests.mutations [NAME]``.

Every error is planted in a copy of the sources, and its test is run there. An error that survives is a hole in the
tests, and ends the command with status 1. Before any error is planted, all the tests are run on a copy without one: a
test that fails there catches nothing, so nothing is reported then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PACKAGE = "vllm_hidden_transfer"
IDENTITY = "tests/engine/test_identity.py::test_core[float32-eager]"
PENALISED = "tests/statistics/test_sampling_parameters.py::test_every_parameter[frequency]"
SEEDED = "tests/engine/test_sampling.py::test_a_seed_gives_the_text_of_no_speculation"
MIXED = "tests/matrix/test_features.py::test_identical[default-mixed]"
DRAFTS = "tests/engine/test_draft_pass.py::test_drafts_equal_transformers[token-8]"
CHUNKS = (
    "tests/engine/test_stock_bugs.py::test_a_seeded_prompt_in_chunks_gives_the_text_of_one_piece"
)
V2_GREEDY = "tests/engine/v2/test_identity.py::test_greedy[async-float32]"
V2_SEEDED = "tests/engine/v2/test_identity.py::test_a_seed_gives_the_text_of_no_speculation[async]"
V2_DRAFTS = "tests/engine/v2/test_transfer.py::test_drafts_are_those_of_v1"
GPU_PLANTED = "tests/engine/v2/test_device.py::test_planted_trees[async-7]"
BUDGET = "tests/unit/test_budget.py"
V2_TENSORS = "tests/unit/test_tree_tensors.py"
REQUESTS = "tests/engine/test_draft_requests.py"
ENUMERATION = "tests/statistics/test_enumeration.py"
KERNELS = "tests/unit/kernels/test_kernels.py"
KERNELS_FOLDER = "engine/attention/kernels"


@dataclass(frozen=True)
class Mutation:
    """One planted error: texts of a file, what they become, and the test that must fail."""

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    test: str


MUTATIONS = (
    Mutation(
        "mask off by one",
        "tree/layout.py",
        (("(root_rows[of][run] + 1)[inside]", "(root_rows[of][run])[inside]"),),
        IDENTITY,
    ),
    Mutation(
        "position off by one",
        "engine/v1/runner.py",
        (
            (
                "from_numpy(step.root_positions[requests] + depths)",
                "from_numpy(step.root_positions[requests] + depths + 1)",
            ),
        ),
        IDENTITY,
    ),
    Mutation(
        "compaction skipped",
        "engine/v1/runner.py",
        (
            (
                "self.compact(step.root_rows[requests] + 1 + nodes, blocks * size + positions % size)",
                "self.compact(step.root_rows[:0], blocks[:0])",
            ),
        ),
        IDENTITY,
    ),
    Mutation(
        "parents out of step with tokens",
        "engine/v1/runner.py",
        (
            (
                "self.trees[request_id] = tree",
                "self.trees[request_id] = TokenTree(\n"
                "                tree.tokens, np.array([-1, *tree.parents[:-1]][: len(tree)], dtype=np.int64)\n"
                "            )",
            ),
        ),
        IDENTITY,
    ),
    Mutation(
        "truncation ignored",
        "engine/v1/runner.py",
        (("return tree.truncated(len(tokens))", "return tree"),),
        IDENTITY,
    ),
    Mutation(
        "stale tree",
        "engine/v1/runner.py",
        (
            ("self.trees[request_id] = tree", "self.trees.setdefault(request_id, tree)"),
            ("self.trees.pop(request_id, None)", "self.trees.get(request_id)"),
            (
                "if tree is not None and tree.tokens[: len(tokens)].tolist() == list(tokens):",
                "if tree is not None and len(tree) >= len(tokens):",
            ),
        ),
        "tests/matrix/test_features.py::test_identical[preemption-greedy]",
    ),
    Mutation(
        "hidden state of the wrong row",
        "engine/v1/step.py",
        (("np.array(self.walk.nodes) + 1", "np.array(self.walk.nodes)"),),
        DRAFTS,
    ),
    Mutation(
        "penalty path ignored",
        "engine/v1/sampling.py",
        (("[*outputs[request], *walk.tokens[request]]", "[*outputs[request]]"),),
        PENALISED,
    ),
    Mutation(
        "seed row shifted",
        "engine/v1/sampling.py",
        (
            (
                "place: metadata.generators[request]",
                "len(requests) - 1 - place: metadata.generators[request]",
            ),
        ),
        SEEDED,
    ),
    Mutation(
        "bonus token doubled",
        "engine/v1/sampling.py",
        (
            (
                "(num_requests, len(steps)), PLACEHOLDER",
                "(num_requests, len(steps) + 1), PLACEHOLDER",
            ),
            (
                "sampled[requests, depth] = output.sampled_token_ids[:, 0]",
                "sampled[requests, depth : depth + 2] = output.sampled_token_ids",
            ),
        ),
        IDENTITY,
    ),
    Mutation(
        "min_tokens counts no path",
        "engine/v1/sampling.py",
        (("if len(output) + len(walk.tokens[request]) < minimum:", "if len(output) < minimum:"),),
        "tests/matrix/test_features.py::test_identical[default-min_tokens]",
    ),
    Mutation(
        "min_p of another request",
        "engine/v1/sampling.py",
        (
            (
                "picked.min_p = processor.min_p[requests]",
                "picked.min_p = processor.min_p[requests[::-1]]",
            ),
        ),
        MIXED,
    ),
    Mutation(
        "scratch copy skipped",
        "tree/layout.py",
        (("partial = first_positions[of] % block_size > 0", "partial = first_positions[of] < 0"),),
        IDENTITY,
    ),
    Mutation(
        "draw of an unfinished prompt not taken back",
        "patches/seeded_chunks.py",
        (("generator.set_state(states[request])", "pass"),),
        CHUNKS,
    ),
    Mutation(
        "walk does not move",
        "tree/walk.py",
        (("self.nodes[request] = child", "pass"),),
        ENUMERATION,
    ),
    Mutation(
        "calibration ignored",
        "engine/v1/transfer_source.py",
        (
            (
                "            self.config.calibration.temperatures, dtype",
                "            [1.0] * self.config.num_transfer_steps, dtype",
            ),
        ),
        f"{REQUESTS}::test_trees_are_the_best_under_the_calibration",
    ),
    Mutation(
        "one scratch block for the draft rows of all",
        "tree/layout.py",
        (
            (
                "first = scratch.blocks.start + np.cumsum(missing) - missing",
                "first = scratch.blocks.start + 0 * missing",
            ),
        ),
        f"{REQUESTS}::test_rows_without_a_block_are_the_requests_own",
    ),
    Mutation(
        "one request's blocks for the draft rows of all",
        "engine/v1/transfer_source.py",
        (("table.block_table.np[batch_rows],", "table.block_table.np[batch_rows * 0],"),),
        f"{REQUESTS}::test_drafts_are_made_with_the_requests_adapter",
    ),
    Mutation(
        "the first request's adapter for the draft rows of all",
        "engine/v1/runner.py",
        (
            (
                "counts[batch_rows] = rows_each",
                "counts[batch_rows[0]] = rows_each * len(batch_rows)",
            ),
        ),
        f"{REQUESTS}::test_drafts_are_made_with_the_requests_adapter",
    ),
    Mutation(
        "trees of finished requests kept",
        "engine/v1/runner.py",
        (("        self.trees.pop(req_id, None)\n", ""),),
        "tests/engine/test_trees_of_requests.py::test_nothing_is_kept_of_requests_that_are_gone",
    ),
    Mutation(
        "whole trees under a grammar",
        "engine/v1/runner.py",
        (
            (
                "return tree if params.structured_outputs is None else limit_runs(tree, 1)",
                "return tree",
            ),
        ),
        "tests/engine/test_trees_of_requests.py::test_a_request_with_a_grammar_gets_a_chain",
    ),
    Mutation(
        "V2: positions stay linear",
        "engine/v2/slots.py",
        (("[batch.expanded_idx_mapping, rows] - rows", "[batch.expanded_idx_mapping, rows] * 0"),),
        V2_GREEDY,
    ),
    Mutation(
        "V2: no compaction",
        "engine/v2/cpu.py",
        (("& (path != depths)", "& (path < 0)"),),
        V2_GREEDY,
    ),
    Mutation(
        "GPU: no compaction",
        "engine/v2/device.py",
        (("            walk.num_accepted,\n", "            walk.num_accepted * 0,\n"),),
        GPU_PLANTED,
    ),
    Mutation(
        "GPU: trees of another slot",
        "engine/v2/device.py",
        (
            (
                "self._tree_rows.write(self.slots.parents, batch.idx_mapping, drafts)",
                "self._tree_rows.write(self.slots.parents, batch.idx_mapping * 0, drafts)",
            ),
        ),
        GPU_PLANTED,
    ),
    Mutation(
        "drafts where they do not pay",
        "drafting/budget.py",
        (("if too_soon or owed + (0.0 if pays else loss) > FIRST_TRIES:", "if False:"),),
        BUDGET,
    ),
    Mutation(
        "a promise is what is kept of it",
        "drafting/ledger.py",
        (("return (self.accepted + weight * prior) / (self.promised + weight)", "return 1.0"),),
        BUDGET,
    ),
    Mutation(
        "a first pass that warms up is charged",
        "drafting/ledger.py",
        (("        if self._cold:\n", "        if False:\n"),),
        f"{BUDGET}::test_the_first_pass_may_be_a_slow_one",
    ),
    Mutation(
        "steps without trees push those with out of the costs",
        "drafting/costs.py",
        (("(self._hints if weight < 1 else self._passes)", "self._passes"),),
        f"{BUDGET}::test_steps_without_trees_do_not_push_out_those_with",
    ),
    Mutation(
        "any number of nodes is verified behind a pass",
        "drafting/budget.py",
        (("(given - choice.rate * seconds)[:most]", "(given - choice.rate * seconds)"),),
        f"{BUDGET}::test_a_step_into_the_unknown_is_a_small_one",
    ),
    Mutation(
        "copies are trusted as at the start",
        "drafting/text.py",
        (("            self._trust.observe(cells, right[:told])\n", "            pass\n"),),
        "tests/unit/test_text_drafts.py::test_trust_in_copies_is_learned_from_the_text",
    ),
    Mutation(
        "V2: parents out of step with tokens",
        "engine/v2/slots.py",
        (
            (
                "self.parents.index_copy_(0, slots, trees.parents)",
                "self.parents.index_copy_(0, slots, (trees.parents - 1).clamp(min=-1))",
            ),
        ),
        V2_GREEDY,
    ),
    Mutation(
        "V2: noise of the wrong position",
        "engine/v2/verify.py",
        (("pos + self._slots.depths[expanded_idx_mapping, row] - row,", "pos,"),),
        V2_SEEDED,
    ),
    Mutation(
        "V2: penalty path ignored",
        "engine/v2/penalties.py",
        (("on_path.to(counts.dtype))", "on_path.to(counts.dtype) * 0)"),),
        V2_SEEDED,
    ),
    Mutation(
        "V2: hidden state of the root",
        "engine/v2/runner.py",
        (("self.last_rows = roots + last[:, 0]", "self.last_rows = roots"),),
        V2_DRAFTS,
    ),
    Mutation(
        "V2: a rejected node's child is accepted",
        "tree/tensors.py",
        (("(drawn[:, None, :] | ~reach).all(-1)", "drawn"),),
        V2_TENSORS,
    ),
    Mutation(
        "training on held-out answers",
        "training/run.py",
        (
            (
                "train=[example for example in examples if not example.held_out],",
                "train=list(examples),",
            ),
        ),
        "tests/unit/test_corpus.py::test_nothing_that_is_judged_is_taught",
    ),
    Mutation(
        "auto takes the worst layer",
        "training/layer_choice.py",
        (("key=lambda found: -found.worth", "key=lambda found: found.worth"),),
        "tests/unit/test_corpus.py::test_the_layer_with_most_tokens_per_unit_of_cost_comes_first",
    ),
    Mutation(
        "tune judges on what it fitted",
        "evaluation/tuning.py",
        (("_quality(prepared, judge_on, *setting)", "_quality(prepared, fit_on, *setting)"),),
        "tests/unit/test_study.py::test_tune_judges_on_what_it_was_not_fitted_on",
    ),
    Mutation(
        "own_share ignored",
        "training/run.py",
        (("if settings.own_share is not None:", "if False:"),),
        "tests/unit/test_corpus.py::test_the_share_of_own_answers_is_kept[0.3]",
    ),
    Mutation(
        "trees are not cut where a pass is planned",
        "engine/v1/runner.py",
        (("trees = self.fit_to_scratch(trees, first_positions, rows_before)", "pass"),),
        "tests/engine/test_stress.py::test_a_pass_beside_older_trees",
    ),
    Mutation(
        "scratch goes to the vaguest runs",
        "tree/layout.py",
        (
            (
                'order = np.argsort(-densities, kind="stable")',
                'order = np.argsort(densities, kind="stable")',
            ),
        ),
        "tests/unit/test_layout.py::test_scratch_goes_where_it_is_worth_most",
    ),
    Mutation(
        "own tokens of another request",
        "drafting/vocabulary.py",
        (
            (
                "own = [self._own(tokens, limit) for tokens in token_ids]",
                "own = [self._own(token_ids[0], limit) for _ in token_ids]",
            ),
        ),
        "tests/unit/test_vocabulary.py::test_no_tokens_of_another_request_and_none_of_before",
    ),
    Mutation(
        "columns taken for tokens",
        "drafting/distributions.py",
        (("tokens = columns.gather(1, tokens.flatten(1)).view_as(tokens)", "pass"),),
        "tests/unit/test_vocabulary.py::test_candidates_of_some_columns_are_those_of_masked_logits",
    ),
    Mutation(
        "places without a token drafted",
        "engine/draft_head.py",
        (("own[:, None] < 0, -torch.inf", "own[:, None] < 0, 0.0"),),
        "tests/unit/test_draft_head.py::test_logits_are_the_whole_heads[plain]",
    ),
    Mutation(
        "a study of all tokens",
        "evaluation/drafts.py",
        (("logits = logits.masked_fill(left_out, -torch.inf)", "pass"),),
        "tests/unit/test_study.py::test_drafts_of_a_vocabulary_are_the_softmax_over_it",
    ),
    Mutation(
        "kernels: ancestors shifted by one",
        f"{KERNELS_FOLDER}/ancestors.py",
        (("one << (current % 32)", "one << ((current + 1) % 32)"),),
        f"{KERNELS}::test_ancestors[cpu]",
    ),
    Mutation(
        "kernels: a context below zero",
        f"{KERNELS_FOLDER}/tree_attention.py",
        (
            (
                "context = tl.maximum(tl.load(seq_lens_ptr + request) - n, 0)",
                "context = tl.load(seq_lens_ptr + request) - n",
            ),
        ),
        f"{KERNELS}::test_a_sequence_shorter_than_its_rows[cpu-1]",
    ),
    Mutation(
        "kernels: what is below the window read",
        f"{KERNELS_FOLDER}/tree_attention.py",
        (
            (
                "valid = (places >= first_place) & (places < context)",
                "valid = places < context",
            ),
        ),
        f"{KERNELS}::test_nothing_below_the_window_is_read[cpu-9]",
    ),
    Mutation(
        "kernels: compaction from the deepest node on",
        f"{KERNELS_FOLDER}/compaction.py",
        (("for depth in range(1, DEPTHS + 1):", "for depth in range(DEPTHS, 0, -1):"),),
        f"{KERNELS}::test_compaction[cpu]",
    ),
)


def copy_sources(folder: Path) -> None:
    """Copy what the tests need to a folder."""
    for name in (PACKAGE, "tests", "examples", "benchmarks", "docs", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def plant(mutation: Mutation, folder: Path) -> None:
    """Plant the error in the sources in a folder."""
    path = folder / PACKAGE / mutation.file
    text = path.read_text()
    for before, after in mutation.changes:
        if text.count(before) != 1:
            raise ValueError(
                f"{mutation.name}: {mutation.file} has {before!r} {text.count(before)} times, not once"
            )
        text = text.replace(before, after)
    path.write_text(text)


@dataclass(frozen=True)
class Outcome:
    """How tests ended."""

    status: int
    """pytest's exit status."""
    output: str

    @property
    def passed(self) -> bool:
        """All were run, and none failed."""
        return self.status == 0

    @property
    def failed(self) -> bool:
        """Tests failed. A crash counts too; a wrong name of a test or an interrupt does not."""
        return self.status not in (0, 2, 3, 4, 5)

    @property
    def last_line(self) -> str:
        """pytest's summary."""
        return (self.output.strip().splitlines() or ["no output"])[-1]


def run_tests(tests: Sequence[str], folder: Path) -> Outcome:
    """Run tests on the sources in a folder, up to the first failure."""
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    # In the copy, so that its package comes before the installed one and before that of an outer PYTHONPATH.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    return Outcome(done.returncode, done.stdout)


def control(mutations: Sequence[Mutation], root: Path) -> Outcome:
    """All tests of these mutations, each once, on sources without an error.

    Args:
        mutations: those whose tests are run.
        root: an empty folder for the copy.
    """
    copy_sources(root)
    return run_tests(sorted({mutation.test for mutation in mutations}), root)


def catch(mutation: Mutation) -> Outcome:
    """The mutation's test on sources with its error."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_sources(folder)
        plant(mutation, folder)
        return run_tests([mutation.test], folder)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="only these; all by default")] = None,
) -> None:
    """Plant every error and report which test caught it."""
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    console = Console(width=160)
    unknown = sorted({*(names or ())} - {mutation.name for mutation in MUTATIONS})
    if unknown:
        console.print(f"no such error: {', '.join(unknown)}")
        raise typer.Exit(1)
    with tempfile.TemporaryDirectory() as folder:
        plain = control(chosen, Path(folder))
    console.print(f"no error planted: {plain.last_line}", highlight=False)
    if not plain.passed:
        console.print(plain.output, markup=False, highlight=False)
        console.print("the tests fail without an error: nothing that they catch means anything")
        raise typer.Exit(1)
    table = Table("planted error", "caught", "by", "s")
    survived = []
    for mutation in chosen:
        started = time.monotonic()
        found = catch(mutation)
        seconds = time.monotonic() - started
        console.print(f"{mutation.name}: {found.last_line}", highlight=False)
        caught = "yes" if found.failed else "NO"
        table.add_row(mutation.name, caught, mutation.test, f"{seconds:.0f}")
        if not found.failed:
            survived.append(mutation.name)
    console.print(table)
    if survived:
        console.print(f"survived: {', '.join(survived)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
