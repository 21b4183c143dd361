# SPDX-License-Identifier: Apache-2.0
"""The child processes of calls 4 to 7: one engine in this process, and what a job wants of it."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from common import ROOT, append
from session import Session
from timing import synchronised_ms

PROFILED = 8
PROMPTS = ROOT / "examples" / "prompts" / "unseen.jsonl"
FEWEST = 8
"""Prompts that are answered where they come one at a time."""


def steps(session: Session) -> None:
    """Milliseconds of a decode step, and tokens that a request gets of it."""
    for requests in session.setting["requests"]:
        stamps, counts = session.decode(requests, session.setting["steps"])
        if len(stamps) < 2:
            raise RuntimeError(f"{requests} texts ended before a step could be timed")
        append(
            "steps",
            job=session.job["name"],
            requests=requests,
            **{
                "ms a step": 1e3 * statistics.median(np.diff(stamps).tolist()),
                "tokens a step": statistics.mean(counts) / requests,
            },
            stamps=stamps,
        )


def draft_pass(session: Session) -> None:
    """The draft pass alone, eager and as a graph, behind steps that left block tables of as many requests."""
    from vllm_hidden_transfer.engine.v2.slot_batch import SlotBatch

    runner = session.runner
    if session.setting["tiny"]:
        from tests.support.fake_graph import capture_everything

        capture_everything(runner)
    config, device = runner.model_config, runner.device
    for requests in session.setting["requests"]:
        session.decode(requests, 2)
        slots = torch.arange(requests, device=device)
        size = (requests, config.get_hidden_size())
        batch = SlotBatch(
            slots=slots,
            sampled=slots + 3,
            roots=torch.full_like(slots, session.setting["context"]),
            num_sampled=torch.ones_like(slots).int(),
            hidden=torch.randn(size, device=device, dtype=config.dtype),
            request_ids=[],
            budget=runner.num_speculative_steps,
        )
        graphs = runner.speculator.graphs
        graph = None if graphs is None else graphs.fitting(batch)
        with torch.inference_mode():
            eager = synchronised_ms(partial(runner.draft_source.propose_tensors, batch))
            replayed = None
            if graph is not None:
                replayed = synchronised_ms(partial(graphs.replayed, graph, batch))
        row = {"requests": requests, "eager ms": eager, "graph ms": replayed}
        append("drafts", job=session.job["name"], **row)


def texts(session: Session) -> None:
    """Texts of real prompts in groups of so many requests, and how fast they came."""
    tokenizer, groups = session.llm.get_tokenizer(), session.setting["requests"]
    lines = PROMPTS.read_text().splitlines()[: max(groups)]
    chats = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    prompts = [
        tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for chat in chats
    ]
    session.run(prompts[:2], session.setting["warm_up"])
    for size in groups:
        chosen = prompts[: max(size, FEWEST)]
        found: list[list[int]] = []
        began = time.perf_counter()
        for start in range(0, len(chosen), size):
            found += session.run(chosen[start : start + size], session.setting["steps"])[2]
        seconds = time.perf_counter() - began
        append(
            "texts",
            job=session.job["name"],
            requests=size,
            seconds=seconds,
            prompts=chosen,
            outputs=found,
        )


def profiled(session: Session) -> None:
    """torch's table of some decode steps."""
    from torch.profiler import ProfilerActivity, profile

    requests = session.setting["requests"][-1]
    session.decode(requests, 2)
    kinds = [ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if torch.cuda.is_available():
        kinds, key = [*kinds, ProfilerActivity.CUDA], "self_cuda_time_total"
    with profile(activities=kinds) as found:
        session.decode(requests, PROFILED)
    averages = found.key_averages()
    table = averages.table(sort_by=key, row_limit=30, max_name_column_width=70)
    append("profile", job=session.job["name"], table=table)


WORK: dict[str, Callable[[Session], None]] = {
    function.__name__: function for function in (steps, draft_pass, texts, profiled)
}


def main() -> None:
    asked = json.loads(sys.argv[1])
    session = Session(asked["setting"], asked["job"])
    for name in asked["job"]["work"]:
        WORK[name](session)
    session.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
