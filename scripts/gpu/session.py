# SPDX-License-Identifier: Apache-2.0
"""An engine in this process, driven step by step, with the clock in hand."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import append


class Session:
    """An engine and the job that it is for."""

    def __init__(self, setting: dict[str, Any], job: dict[str, Any]) -> None:
        from vllm import LLM

        self.setting, self.job = setting, job
        self.is_ours = "hidden_transfer" in str(job["engine"].get("speculative_config"))
        if setting["tiny"] and self.is_ours:
            from tests.support import device_bed

            device_bed.use()
        began = time.perf_counter()
        self.llm: Any = LLM(**job["engine"])
        seconds = time.perf_counter() - began
        free = "on a CPU"
        if torch.cuda.is_available():
            free = f"{torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB left"
        append("started", job=job["name"], seconds=seconds, free=free)
        self._count = 0

    @property
    def runner(self) -> Any:
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner

    def run(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, steps: int | None = None
    ) -> tuple[list[float], list[int], list[list[int]]]:
        """Answer prompts as one batch.

        Args:
            prompts: token ids.
            max_tokens: of each.
            steps: stop after as many that answered all requests; None for all of them.

        Returns:
            When each step that answered all requests ended, how many tokens it gave, and the texts.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        params = SamplingParams(
            temperature=0.0,
            ignore_eos=steps is not None,
            detokenize=False,
            max_tokens=max_tokens,
            output_kind=RequestOutputKind.DELTA,
        )
        texts: dict[str, list[int]] = {}
        for prompt in prompts:
            self._count += 1
            texts[str(self._count)] = []
            ids = TokensPrompt(prompt_token_ids=list(prompt))
            engine.add_request(str(self._count), ids, params)
        stamps: list[float] = []
        counts: list[int] = []
        while engine.has_unfinished_requests() and (steps is None or len(stamps) <= steps):
            outputs = engine.step()
            for one in outputs:
                texts[one.request_id] += one.outputs[0].token_ids
            if len(outputs) == len(prompts):
                stamps.append(time.perf_counter())
                counts.append(sum(len(one.outputs[0].token_ids) for one in outputs))
        engine.abort_request(list(texts))
        while engine.has_unfinished_requests():
            engine.step()
        return stamps, counts, list(texts.values())

    def random_prompts(self, count: int) -> list[list[int]]:
        shape = json.loads((Path(self.setting["target"]) / "config.json").read_text())
        rng = np.random.default_rng(count)
        size = (count, self.setting["context"])
        return rng.integers(3, shape["vocab_size"], size).tolist()

    def decode(self, requests: int, steps: int) -> tuple[list[float], list[int]]:
        """When each step ended and how many tokens it gave, the first ones left out."""
        room = self.job["engine"]["max_model_len"] - self.setting["context"] - 1
        prompts = self.random_prompts(requests)
        warm_up = self.setting["warm_up"]
        stamps, counts, _ = self.run(prompts, room, warm_up + steps)
        return stamps[warm_up:], counts[warm_up + 1 :]
