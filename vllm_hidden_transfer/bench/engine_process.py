# SPDX-License-Identifier: Apache-2.0
"""vLLM engines in subprocesses of their own, held open side by side.

A fair comparison on one machine needs two engines that exist at the same time (the machine's speed
drifts) but compute in turns, each with its own memory and environment. The parent never imports
vLLM; a child that dies is reported in one sentence with its own last error line.
"""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Prompt = Sequence[int] | Sequence[Mapping[str, str]]
"""Token ids, or chat messages for the model's own template."""

# Both sides of a comparison get these: two threads on two cores need vLLM's own binding off, idle
# threads must not spin beside the other engine, and the stock KV split would make outputs depend on
# the number of rows in a step.
COMMON_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_ATTN_SPLIT_KV": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class EngineDiedError(RuntimeError):
    """The child process ended or did not answer; the message is one sentence."""


@dataclass
class Generation:
    """One request's answer and when its tokens came."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    step_seconds: list[float] = field(default_factory=list)
    """Per engine step that brought tokens: seconds since the whole batch was handed in."""
    step_tokens: list[int] = field(default_factory=list)

    @property
    def passes(self) -> int:
        """Decode passes: the steps after the one that ended the prompt with the first token."""
        return max(len(self.step_tokens) - 1, 0)

    @property
    def decoded(self) -> int:
        """Output tokens after the first."""
        return max(len(self.token_ids) - 1, 0)

    @property
    def seconds(self) -> float:
        return self.step_seconds[-1] if self.step_seconds else 0.0

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.step_seconds[0] if self.step_seconds else 0.0


def acceptance_length(generations: Sequence[Generation]) -> float:
    """Output tokens after the first per decode pass, summed over requests; nan where none decoded."""
    passes = sum(generation.passes for generation in generations)
    return (
        sum(generation.decoded for generation in generations) / passes if passes else float("nan")
    )


@dataclass(frozen=True)
class SpecCounters:
    """vLLM's own speculation counters; positions are depths of the tree."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_depth: tuple[int, ...] = ()

    def __sub__(self, earlier: "SpecCounters") -> "SpecCounters":
        before = earlier.accepted_per_depth or (0,) * len(self.accepted_per_depth)
        return SpecCounters(
            self.drafts - earlier.drafts,
            self.draft_tokens - earlier.draft_tokens,
            self.accepted_tokens - earlier.accepted_tokens,
            tuple(now - then for now, then in zip(self.accepted_per_depth, before, strict=True)),
        )


def spec_counters(metrics: Sequence[Mapping[str, Any]]) -> SpecCounters:
    """Read the speculation counters out of what `EngineProcess.metrics` returned."""
    values = {
        metric["name"].removeprefix("vllm:spec_decode_"): metric["value"] for metric in metrics
    }
    return SpecCounters(
        int(values.get("num_drafts", 0)),
        int(values.get("num_draft_tokens", 0)),
        int(values.get("num_accepted_tokens", 0)),
        tuple(int(value) for value in values.get("num_accepted_tokens_per_pos", ())),
    )


def last_error_line(log: str) -> str:
    """The line of a Python log that says why it ended: the last exception, else the last line."""
    lines = [
        re.sub(r"^(\(.*?\) )?(ERROR|CRITICAL) [\d-]+ [\d:]+ \[.*?\] ", "", line).strip()
        for line in log.splitlines()
    ]
    lines = [line for line in lines if line]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (errors or lines or ["it printed nothing"])[-1]


@dataclass(frozen=True)
class Output:
    """What one engine step brought for one request of a load."""

    clock: float
    """Seconds that the load took until then."""
    index: int
    token_ids: list[int]
    finish_reason: str | None


@dataclass(frozen=True)
class Turn:
    """A few engine steps of a load."""

    clock: float
    """Seconds that the load took so far; it stands still between turns."""
    began: list[tuple[float, int]]
    """When requests were handed in, and their index."""
    outputs: list[Output]
    over: bool
    """Whether all is answered."""


class EngineProcess:
    """One engine in one subprocess. Starting returns at once; `wait_ready` waits for the engine."""

    def __init__(
        self,
        name: str,
        llm_kwargs: Mapping[str, Any],
        log: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.start_seconds: float | None = None
        self.vllm_version = ""
        """Known as soon as the engine is ready."""
        log.parent.mkdir(parents=True, exist_ok=True)
        read_end, write_end = os.pipe()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.engine_child", str(write_end)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(write_end,),
                env={**os.environ, **COMMON_ENV, **(env or {})},
                text=True,
                start_new_session=True,
            )
        os.close(write_end)
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(read_end,), daemon=True).start()
        self._send(op="start", llm_kwargs={"disable_log_stats": False, **llm_kwargs})

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor) as pipe:
            for line in pipe:
                self._replies.put(line)
        self._replies.put(None)

    def _died(self, what: str) -> EngineDiedError:
        last = last_error_line(self.log.read_text(errors="replace"))
        return EngineDiedError(f"The engine '{self.name}' {what}: {last} (its log is {self.log}).")

    def _send(self, **request: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died(f"ended with status {self._process.wait()}") from None

    def _receive(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=timeout)
        except queue.Empty:
            raise self._died(f"did not answer within {timeout:.0f} s") from None
        if line is None:
            raise self._died(f"ended with status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def wait_ready(self, timeout: float = 600.0) -> float:
        """Seconds that the engine took to start; waits for it the first time."""
        if self.start_seconds is None:
            ready = self._receive(timeout)
            self.start_seconds = float(ready["seconds"])
            self.vllm_version = ready["vllm_version"]
        return self.start_seconds

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        on_text: Callable[[int, str], None] | None = None,
        timeout: float = 600.0,
    ) -> list[Generation]:
        """Answer the prompts as one batch.

        `sampling` is the keywords of vLLM's SamplingParams, for all prompts or one set each;
        `on_text` hears (index of the prompt, new text) as it comes; `timeout` is for one step.
        """
        self.wait_ready()
        each = [sampling] * len(prompts) if isinstance(sampling, Mapping) else list(sampling)
        self._send(op="generate", prompts=[list(prompt) for prompt in prompts], sampling=each)
        generations = [Generation(prompt_ids=ids) for ids in self._receive(timeout)["prompt_ids"]]
        while (reply := self._receive(timeout))["event"] != "done":
            for index, token_ids, text, finish_reason in reply["outputs"]:
                generation = generations[index]
                generation.text += text
                generation.finish_reason = finish_reason
                if token_ids:
                    generation.token_ids += token_ids
                    generation.step_seconds.append(reply["seconds"])
                    generation.step_tokens.append(len(token_ids))
                if on_text is not None and text:
                    on_text(index, text)
        return generations

    def token_ids(self, prompts: Sequence[Prompt], timeout: float = 600.0) -> list[list[int]]:
        """The prompts as the target's own template makes them."""
        self.wait_ready()
        self._send(op="tokenize", prompts=[list(prompt) for prompt in prompts])
        ids: list[list[int]] = self._receive(timeout)["prompt_ids"]
        return ids

    def load(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[Mapping[str, Any]],
        at_a_time: int,
    ) -> None:
        """Hand in requests (token ids) that are answered so many at a time, in turns (`turn`).

        Several engines can so take turns, each idle while another one computes.
        """
        self.wait_ready()
        each = [list(prompt) for prompt in prompts]
        self._send(op="load", prompts=each, sampling=list(sampling), at_a_time=at_a_time)

    def turn(self, seconds: float, timeout: float = 600.0) -> Turn:
        """Engine steps until they took so long together: one where that is 0."""
        self._send(op="turn", seconds=seconds)
        reply = self._receive(timeout)
        return Turn(
            reply["clock"],
            [(clock, index) for clock, index in reply["began"]],
            [Output(*output) for output in reply["outputs"]],
            reply["over"],
        )

    def stop(self, timeout: float = 600.0) -> None:
        """Leave the rest of the load unanswered."""
        self._send(op="stop")
        self._receive(timeout)

    def metrics(self, timeout: float = 60.0) -> list[dict[str, Any]]:
        """vLLM's counters and gauges (`LLM.get_metrics`) since the engine started."""
        self.wait_ready()
        self._send(op="metrics")
        metrics: list[dict[str, Any]] = self._receive(timeout)["metrics"]
        return metrics

    def close(self) -> None:
        """End the child: politely by the end of its input, then by signal with all it started."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10 if self.start_seconds is not None else 0)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
