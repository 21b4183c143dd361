# SPDX-License-Identifier: Apache-2.0
"""A real ``vllm serve`` under load and faults: ``make soak``, or ``python -m tests.soak --minutes 30``.

Hundreds of clients with mixed lengths and sampling parameters, random disconnects, a KV cache small enough to preempt.
Every completed greedy answer is compared with the same vLLM without speculation; at the end nothing may be left
behind: no running request, no used block, no growing memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from openai import APIError, AsyncOpenAI
from rich.console import Console

from tests.doubles import planted
from tests.support.engines import PLANTED, Asker
from tests.support.models import VOCABULARY, add_tokenizer, random_model
from tests.support.servers import metric, serve
from vllm_hidden_transfer.bench.engine_process import EngineProcess
from vllm_hidden_transfer.bench.identity import Judgement, TransformersReference, judge
from vllm_hidden_transfer.names import TEST_DRAFTS_VARIABLE

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "work" / "soak.json"
BUDGET = 8
LONGEST_ANSWER = 48
MODEL_LEN = 320
STOCK: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 28,
    "max_model_len": MODEL_LEN,
    "max_num_seqs": 64,
    "block_size": 32,
}
"""Options of the engine without speculation."""
WARM_MINUTES = 4
"""Until a server has met its largest batches its allocator still grows (measured: up to three minutes)."""
GROWTH_MB, GROWTH_MB_COLD = 64, 192
"""Memory that a server may gain in the last third of a soak, and in one that ends before it is warm."""


@dataclass
class Tally:
    """What happened."""

    greedy_compared: int = 0
    prompts_compared: set[int] = field(default_factory=set)
    differing: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """Prompt, length asked for and token ids of greedy answers that are not those of no speculation."""
    requests: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """The prompts and their greedy answers."""

    prompts: list[list[int]]
    answers: list[list[int]]


def make_target(folder: Path) -> Path:
    """A small random Llama: 2 layers, so that the load is high."""
    return add_tokenizer(random_model(folder / "llama", layers=2))


def make_load(target: Path, count: int, log: Path) -> Load:
    """Random prompts of 3 to 220 tokens, a third of them sharing long beginnings, and stock's greedy answers."""
    rng = random.Random(20261121)

    def tokens(size: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(size)]

    shared = [tokens(96) for _ in range(4)]
    prompts = [
        [*(rng.choice(shared) if index % 3 == 0 else []), *tokens(rng.randrange(3, 120))]
        for index in range(count)
    ]
    options = {"model": str(target), **STOCK}
    sampling = {"temperature": 0.0, "max_tokens": LONGEST_ANSWER, "ignore_eos": True}
    with EngineProcess("reference", options, log, {"VLLM_PLUGINS": ""}) as engine:
        answers = [generation.token_ids for generation in engine.generate(prompts, sampling)]
    return Load(prompts, answers)


class Clients:
    """Concurrent clients that ask until the time is up."""

    def __init__(self, url: str, load: Load, deadline: float, seed: int) -> None:
        self.load, self.deadline = load, deadline
        self.tally = Tally()
        self._rng = random.Random(seed)
        self._client = AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=300,
            # A connection that is kept may be closed by the server just when it is used again.
            http_client=httpx.AsyncClient(
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0), timeout=300
            ),
        )
        self._model = ""

    async def run(self, count: int) -> Tally:
        self._model = (await self._client.models.list()).data[0].id
        await asyncio.gather(*(self._one() for _ in range(count)))
        await self._client.close()
        return self.tally

    async def _one(self) -> None:
        while time.monotonic() < self.deadline:
            kind, stream, leaves = self._draw()
            number = self._rng.randrange(len(self.load.prompts))
            length = self._rng.randrange(1, LONGEST_ANSWER + 1)
            try:
                ids = await self._ask(number, length, kind, stream, leaves)
            except APIError as error:
                self.tally.errors.append(f"{kind}: {error}")
                await asyncio.sleep(1)
                continue
            self.tally.requests["disconnected" if ids is None else kind] += 1
            if kind == "greedy" and ids is not None:
                self._compare(number, length, ids)

    def _draw(self) -> tuple[str, bool, bool]:
        kind = self._rng.choices(["greedy", "sampled", "processed", "regex"], [70, 14, 12, 4])[0]
        stream = self._rng.random() < 0.5
        return kind, stream, self._rng.random() < 0.12

    def _options(self, kind: str, length: int) -> dict[str, Any]:
        rng = self._rng
        extra: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
        options: dict[str, Any] = {"max_tokens": length, "temperature": 0.0, "extra_body": extra}
        if kind == "sampled":
            options |= {"temperature": rng.choice([0.5, 1.0]), "top_p": rng.choice([0.8, 1.0])}
            if rng.random() < 0.5:
                options["seed"] = rng.randrange(1 << 16)
        elif kind == "processed":
            options |= {"presence_penalty": 0.3, "logit_bias": {"7": 3}}
            extra |= {"repetition_penalty": 1.2, "min_tokens": length // 2, "min_p": 0.05}
        elif kind == "regex":
            extra |= {"structured_outputs": {"regex": "[a-z]{12}"}, "ignore_eos": False}
        return options

    async def _ask(
        self, number: int, length: int, kind: str, stream: bool, leaves: bool
    ) -> list[int] | None:
        """The answer's token ids; None where the client has gone away before the end."""
        request = self._client.completions.create(
            model=self._model,
            prompt=self.load.prompts[number],
            stream=stream,
            **self._options(kind, length),
        )
        if not stream:
            try:
                timeout = self._rng.random() * 2 if leaves else None
                reply = await asyncio.wait_for(request, timeout)
            except TimeoutError:
                return None
            return list(reply.choices[0].token_ids)
        ids: list[int] = []
        chunks = 0
        async with await request as reply:
            async for chunk in reply:
                ids += chunk.choices[0].token_ids or [] if chunk.choices else []
                chunks += 1
                if leaves and chunks > length // 6:
                    return None
        return ids

    def _compare(self, number: int, length: int, ids: list[int]) -> None:
        self.tally.greedy_compared += 1
        self.tally.prompts_compared.add(number)
        expected = self.load.answers[number][:length]
        if ids != expected:
            self.tally.differing.append((number, length, ids))


def memory_mb(process: psutil.Process) -> float:
    """Resident memory of a process and all that it started."""
    family = [process, *process.children(recursive=True)]
    return float(sum(each.memory_info().rss for each in family if each.is_running()) / 2**20)


async def watch_memory(minutes: float) -> list[float]:
    """The servers' memory, every few seconds."""
    servers = [
        each
        for each in psutil.Process().children()
        if "serve" in " ".join(each.cmdline()) and each.is_running()
    ]
    seen = []
    end = time.monotonic() + minutes * 60
    while time.monotonic() < end:
        seen.append(sum(memory_mb(each) for each in servers))
        await asyncio.sleep(3)
    return seen


async def soak(
    url: str, load: Load, minutes: float, clients: int, seed: int
) -> tuple[Tally, list[float]]:
    deadline = time.monotonic() + minutes * 60
    asking = Clients(url, load, deadline, seed=seed).run(clients)
    tally, memory = await asyncio.gather(asking, watch_memory(minutes))
    return tally, memory


def wait_idle(url: str, seconds: float = 60) -> dict[str, float]:
    """What the server still holds once nobody asks any more."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    end = time.monotonic() + seconds
    while True:
        held = {name: metric(url, f"vllm:{name}") for name in names}
        if not any(held.values()) or time.monotonic() > end:
            return held
        time.sleep(0.5)


def run(minutes: float, clients: int, prompts: int, folder: Path, seed: int) -> dict[str, Any]:
    """One soak; the report, with what went wrong under "problems". The seed draws what clients ask, not when."""
    print(f"seed {seed}", flush=True)
    target = make_target(folder)
    load = make_load(target, prompts, folder / "reference.log")
    sequences = [[*p, *a] for p, a in zip(load.prompts, load.answers, strict=True)]
    planted.write_answers(folder / "answers.json", sequences, VOCABULARY)
    arguments = {
        "--dtype": "float32",
        "--max-model-len": str(MODEL_LEN),
        "--max-num-seqs": "64",
        "--num-gpu-blocks-override": "160",
        "--speculative-config": json.dumps(
            {"method": "hidden_transfer", "num_speculative_tokens": BUDGET}
        ),
        "--additional-config": json.dumps({"hidden_transfer": {"draft_source": PLANTED}}),
    }
    flat = [part for pair in arguments.items() for part in pair]
    log = folder / "server.log"
    with serve(target, *flat, "--disable-uvicorn-access-log", log=log) as url:
        tally, memory = asyncio.run(soak(url, load, minutes, clients, seed))
        held = wait_idle(url)
        counters = {
            name: metric(url, f"vllm:{name}_total")
            for name in ("num_preemptions", "spec_decode_num_drafts", "prefix_cache_hits")
        }
        accepted = metric(url, "vllm:spec_decode_num_accepted_tokens_total")
    report: dict[str, Any] = {
        "seed": seed,
        "minutes": minutes,
        "clients": clients,
        "requests": dict(tally.requests),
        "greedy_compared": tally.greedy_compared,
        "distinct_prompts": len(tally.prompts_compared),
        "counters": {**counters, "accepted_tokens": accepted},
        "held_at_the_end": held,
        "memory_mb": {
            "two_thirds": round(max(memory[: 2 * len(memory) // 3 + 1])),
            "end": round(memory[-1]),
        },
    }
    found = _sort_out(tally, load, target)
    report |= {
        "ties": [str(one) for one in found.findings if one not in found.wrong],
        "mismatches": [str(one) for one in found.wrong],
    }
    report["problems"] = _problems(report, tally)
    return report


def _sort_out(tally: Tally, load: Load, target: Path) -> Judgement:
    """What the differing answers are."""
    prompts = [load.prompts[number] for number, _, _ in tally.differing]
    expected = [load.answers[number][:length] for number, length, _ in tally.differing]
    tested = [ids for _, _, ids in tally.differing]
    with Asker(target, **STOCK) as again:
        reference = TransformersReference(target, STOCK["dtype"])
        return judge(prompts, expected, tested, reference, again.ask)


def _problems(report: dict[str, Any], tally: Tally) -> list[str]:
    grown = report["memory_mb"]["end"] - report["memory_mb"]["two_thirds"]
    warm = report["minutes"] * 2 / 3 >= WARM_MINUTES
    allowed = GROWTH_MB if warm else GROWTH_MB_COLD
    counters = report["counters"]
    checks = {
        f"{len(report['mismatches'])} greedy answers differ": bool(report["mismatches"]),
        "no greedy answer was compared": not report["greedy_compared"],
        f"held at the end: {report['held_at_the_end']}": any(report["held_at_the_end"].values()),
        f"memory grew by {grown:.0f} MB": grown > allowed,
        f"{len(tally.errors)} errors, the first: {tally.errors[:1]}": bool(tally.errors),
        "nothing was preempted": not counters["num_preemptions"],
        "no draft was accepted": not counters["accepted_tokens"],
        "nobody disconnected": not tally.requests["disconnected"],
    }
    return [what for what, applies in checks.items() if applies]


def main(
    minutes: Annotated[float, typer.Option(help="how long clients ask")] = 30,
    clients: Annotated[int, typer.Option(help="concurrent clients")] = 200,
    prompts: Annotated[int, typer.Option(help="distinct prompts")] = 600,
    output: Annotated[Path, typer.Option(help="where the report goes")] = REPORT,
    seed: Annotated[
        int | None, typer.Option(help="of the clients; drawn where none is given")
    ] = None,
) -> None:
    """Soak a server and report; status 1 where anything is wrong."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ[TEST_DRAFTS_VARIABLE] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as name:
        drawn = int(time.time()) if seed is None else seed
        report = run(minutes, clients, prompts, Path(name), drawn)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    Console().print_json(data=report)
    if report["problems"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
