# SPDX-License-Identifier: Apache-2.0
"""The demo: real questions to the same vLLM without speculation and with hidden transfer.

Both engines are open at once and take turns, prompt by prompt, so that a machine whose speed drifts
treats both alike; which one begins alternates.
"""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from vllm_hidden_transfer.bench.charts import per_depth_png, per_depth_table
from vllm_hidden_transfer.bench.engine_process import (
    EngineProcess,
    Generation,
    SpecCounters,
    acceptance_length,
    spec_counters,
)
from vllm_hidden_transfer.bench.identity import Judgement, TransformersReference, Verdict, judge
from vllm_hidden_transfer.checkpoint.config import TransferConfig
from vllm_hidden_transfer.machine import this_machine
from vllm_hidden_transfer.options import DemoDtype

PLAIN = "no speculation"
HIDDEN = "hidden transfer"
WARM_UP = "Count from one to ten."
WARM_UP_TOKENS = 24
DTYPE_NOTES: dict[DemoDtype, str] = {
    "float32": "both sides must give the same text, word for word (--dtype bfloat16 for the other)",
    "bfloat16": "texts may part where two tokens tie within its rounding, and each such place is judged",
}


class DemoError(Exception):
    """The demo cannot go on, or its outcome is wrong; the message is one sentence."""


@dataclass(frozen=True)
class Question:
    id: str
    kind: str
    prompt: str


@dataclass(frozen=True)
class Answers:
    """What both sides said to one question."""

    question: Question
    plain: Generation
    hidden: Generation


@dataclass(frozen=True)
class Settings:
    target: Path
    checkpoint: Path
    prompts: Path
    output: Path
    budget: int | None
    max_tokens: int
    eager: bool
    command: str
    dtype: DemoDtype = "float32"


def read_questions(path: Path) -> list[Question]:
    try:
        return [Question(**json.loads(line)) for line in path.read_text().splitlines() if line]
    except OSError as error:
        raise DemoError(f"The prompt file {path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise DemoError(
            f"The prompt file {path} needs one JSON object a line with id, kind and prompt: {error}."
        ) from error


def tokens_per_second(generations: Sequence[Generation]) -> float:
    """Output tokens per second of whole requests, the reading of the prompt included."""
    return sum(len(generation.token_ids) for generation in generations) / sum(
        generation.seconds for generation in generations
    )


def per_depth_rates(counters: SpecCounters, depths: int) -> list[float]:
    """Share of the decode passes with drafts whose accepted path reached each depth: those of the maps, and deeper ones
    that a copy reached."""
    rates = [accepted / counters.drafts for accepted in counters.accepted_per_depth]
    return [rate for depth, rate in enumerate(rates) if depth < depths or rate]


def read_depths(checkpoint: Path) -> int:
    """How deep the maps of this checkpoint draft."""
    try:
        text = (checkpoint / "config.json").read_text()
        return TransferConfig.model_validate_json(text).num_transfer_steps
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DemoError(f"The transfer maps in {checkpoint} cannot be used: {reason}.") from error


def banner(log: str) -> str:
    """The line in which the plugin says what runs."""
    found = re.search(r"hidden_transfer is on: .*", log)
    return found.group() if found else ""


def end_tokens(target: Path) -> set[int]:
    """Token ids that end an answer of this target, as its configurations say."""
    ends: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = target / name
        said = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        ends.update(said if isinstance(said, list) else [] if said is None else [said])
    return ends


def judge_answers(
    answers: Sequence[Answers], plain: EngineProcess, settings: Settings
) -> Judgement:
    """Judge hidden transfer's answers; where one parts by rounding, the plain side answers the rest again."""

    def ask(prefixes: list[list[int]], lengths: list[int]) -> list[list[int]]:
        sampling = [{"temperature": 0.0, "max_tokens": length} for length in lengths]
        return [answer.token_ids for answer in plain.generate(prefixes, sampling)]

    return judge(
        [answer.plain.prompt_ids for answer in answers],
        [answer.plain.token_ids for answer in answers],
        [answer.hidden.token_ids for answer in answers],
        TransformersReference(settings.target, settings.dtype),
        ask,
        limits=[settings.max_tokens] * len(answers),
        ends=end_tokens(settings.target),
    )


def verdict_lines(found: Judgement, answers: Sequence[Answers], dtype: DemoDtype) -> list[str]:
    """What the judge says: one line where all is word for word the same, else each place where texts part."""
    identical, total = found.count(Verdict.IDENTICAL), len(answers)
    if identical == total:
        return [f"identical: {identical} of {total}"]
    counts = ", ".join(f"{verdict}: {found.count(verdict)}" for verdict in Verdict)
    places = [f"  {answers[one.prompt].question.id}, {one}" for one in found.findings]
    note = f"(rounding: two tokens that tie within what {dtype} itself moves; the text goes on as without speculation)"
    return [f"{counts} of {total}", *places, note]


def result_table(answers: Sequence[Answers]) -> Table:
    table = Table(
        title="per request, greedy; tokens/s over whole requests, reading the prompt included"
    )
    for column in (
        "",
        "tokens per decode pass",
        f"tokens/s, {PLAIN}",
        f"tokens/s, {HIDDEN}",
        "ratio",
    ):
        table.add_column(column, justify="left" if not column else "right")
    kinds = list(dict.fromkeys(answer.question.kind for answer in answers))
    for kind in [*kinds, "all"]:
        chosen = [answer for answer in answers if kind in ("all", answer.question.kind)]
        plain = [answer.plain for answer in chosen]
        hidden = [answer.hidden for answer in chosen]
        slow, fast = tokens_per_second(plain), tokens_per_second(hidden)
        table.add_row(
            kind,
            f"{acceptance_length(hidden):.2f}",
            f"{slow:.1f}",
            f"{fast:.1f}",
            f"{fast / slow:.2f}",
            style="bold" if kind == "all" else None,
            end_section=kind == kinds[-1],
        )
    return table


class _Screen:
    """Two panels that fill as the tokens come, or plain lines where nobody watches."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._texts = {PLAIN: Text(), HIDDEN: Text()}
        self._notes = {PLAIN: "", HIDDEN: ""}
        self._question = Text()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("answering"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("questions"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("answering", total=total)
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=5, transient=True
        )

    def _panels(self) -> Group:
        grid = Table.grid(expand=True)
        panels = []
        for name, text in self._texts.items():
            grid.add_column(ratio=1)
            panels.append(Panel(text, title=name, subtitle=self._notes[name], height=None))
        grid.add_row(*panels)
        return Group(self._question, grid)

    def _render(self) -> Group:
        return Group(self._panels(), self._progress)

    def __enter__(self) -> "_Screen":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def ask(self, question: Question) -> None:
        self._question = Text.assemble("\n", (question.kind, "bold cyan"), " ", question.prompt)
        self._texts = {PLAIN: Text(), HIDDEN: Text()}
        self._notes = {PLAIN: "", HIDDEN: ""}

    def listener(self, side: str) -> Callable[[int, str], None]:
        def hear(_: int, text: str) -> None:
            self._texts[side].append(text)

        return hear

    def note(self, side: str, generation: Generation) -> None:
        speed = f"{tokens_per_second([generation]):.1f} tokens/s"
        if side == HIDDEN and generation.passes:
            speed += f", {acceptance_length([generation]):.2f} tokens per pass"
        self._notes[side] = speed

    def settle(self) -> None:
        """Leave this question and its two answers behind for good."""
        self._progress.advance(self._task)
        if self._console.is_terminal:
            self._console.print(self._panels())
            return
        self._console.print(self._question)
        for side, text in self._texts.items():
            self._console.print(f"--- {side} ({self._notes[side]})")
            self._console.print(text)


def _start(
    settings: Settings, threads: str, console: Console, stack: ExitStack
) -> dict[str, EngineProcess]:
    common: dict[str, Any] = {
        "model": str(settings.target),
        "dtype": settings.dtype,
        "kv_cache_memory_bytes": 512 << 20,
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "block_size": 32,  # what hidden transfer prefers on a CPU, for both sides
        "enforce_eager": settings.eager,
    }
    speculative: dict[str, Any] = {"method": "hidden_transfer", "model": str(settings.checkpoint)}
    if settings.budget is not None:
        speculative["num_speculative_tokens"] = settings.budget
    sides = {PLAIN: common, HIDDEN: {**common, "speculative_config": speculative}}
    env = {"OMP_NUM_THREADS": threads}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        engines = {}
        tasks = {}
        for name, kwargs in sides.items():
            log = settings.output / f"{name.replace(' ', '_')}.log"
            engines[name] = stack.enter_context(EngineProcess(name, kwargs, log, env))
            how = "eager" if settings.eager else "compiling, a minute or two"
            tasks[name] = progress.add_task(f"starting vLLM, {name} ({how})", total=1)
        for name, engine in engines.items():
            engine.wait_ready()
            progress.update(tasks[name], completed=1)
        # The first steps of an engine touch memory and shapes for the first time.
        warm_up = [{"role": "user", "content": WARM_UP}]
        for engine in engines.values():
            engine.generate([warm_up], {"temperature": 0.0, "max_tokens": WARM_UP_TOKENS})
    return engines


def _ask_all(
    engines: dict[str, EngineProcess],
    questions: Sequence[Question],
    max_tokens: int,
    console: Console,
) -> list[Answers]:
    sampling = {"temperature": 0.0, "max_tokens": max_tokens}
    answers = []
    with _Screen(console, len(questions)) as screen:
        for number, question in enumerate(questions):
            screen.ask(question)
            message = [{"role": "user", "content": question.prompt}]
            said: dict[str, Generation] = {}
            for side in (PLAIN, HIDDEN) if number % 2 == 0 else (HIDDEN, PLAIN):
                (said[side],) = engines[side].generate(
                    [message], sampling, on_text=screen.listener(side)
                )
                screen.note(side, said[side])
            screen.settle()
            answers.append(Answers(question, said[PLAIN], said[HIDDEN]))
    return answers


def _report(
    answers: Sequence[Answers],
    found: Judgement,
    counters: SpecCounters,
    settings: Settings,
    console: Console,
) -> None:
    hidden = [answer.hidden for answer in answers]
    passes = sum(generation.passes for generation in hidden)
    console.print(result_table(answers))
    verdict, *rest = verdict_lines(found, answers, settings.dtype)
    console.print(verdict, style="bold red" if found.wrong else "bold green")
    for line in rest:
        console.print(line, soft_wrap=True)
    console.print(
        f"{passes} decode passes for {sum(g.decoded for g in hidden)} tokens; vLLM's own counters: "
        f"{counters.drafts} drafts of {counters.draft_tokens} tokens, "
        f"{counters.accepted_tokens} accepted",
        soft_wrap=True,
    )
    rates = per_depth_rates(counters, read_depths(settings.checkpoint))
    chart = settings.output / "per_depth_acceptance.png"
    console.print("\naccepted drafts by depth, share of the decode passes with drafts")
    console.print(per_depth_table(rates))
    title = f"{settings.target.name}: {acceptance_length(hidden):.2f} tokens per decode pass"
    per_depth_png(rates, title, chart)
    console.print(f"(also {chart})\n")


def run_demo(settings: Settings, console: Console) -> None:
    """Show it all; raises DemoError where something is missing or a text is wrong."""
    start = time.monotonic()
    for what, folder in (("target", settings.target), ("transfer maps", settings.checkpoint)):
        if not (folder / "config.json").is_file():
            raise DemoError(
                f"There are no {what} in {folder}: `make demo` in a checkout puts them there."
            )
    read_depths(settings.checkpoint)
    questions = read_questions(settings.prompts)
    machine = this_machine()
    threads = os.environ.get("OMP_NUM_THREADS", str(machine.cores))
    console.print(f"dtype {settings.dtype}: {DTYPE_NOTES[settings.dtype]}", soft_wrap=True)
    with ExitStack() as stack:
        engines = _start(settings, threads, console, stack)
        console.print(banner(engines[HIDDEN].log.read_text()), soft_wrap=True)
        before = spec_counters(engines[HIDDEN].metrics())
        answers = _ask_all(engines, questions, settings.max_tokens, console)
        counters = spec_counters(engines[HIDDEN].metrics()) - before
        if counters.drafts == 0:
            raise DemoError(f"vLLM counted no drafts: see {engines[HIDDEN].log}.")
        vllm_version = engines[HIDDEN].vllm_version
        found = judge_answers(answers, engines[PLAIN], settings)
    _report(answers, found, counters, settings, console)
    console.print(
        f"$ {settings.command}\n{machine}, {threads} threads, "
        f"vLLM {vllm_version}, {settings.dtype}, {'both eager' if settings.eager else 'both compiled'}, "
        f"{time.monotonic() - start:.0f} s in all",
        soft_wrap=True,
    )
    wrong = [answers[one.prompt].question.id for one in found.wrong]
    if wrong:
        raise DemoError(f"The two sides differ on {', '.join(wrong)}, which must not happen.")
