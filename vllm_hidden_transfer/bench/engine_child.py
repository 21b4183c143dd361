# SPDX-License-Identifier: Apache-2.0
"""The child of `engine_process`: one vLLM engine that answers JSON lines on a pipe.

Run as `python -m vllm_hidden_transfer.bench.engine_child REPLY_FD`. Requests come on stdin, one JSON
object a line; replies go to the inherited descriptor REPLY_FD, because vLLM prints on stdout as it
likes. The end of stdin ends the child.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, TextIO


def _reply(pipe: TextIO, **fields: Any) -> None:
    pipe.write(json.dumps(fields) + "\n")
    pipe.flush()


class _Engine:
    def __init__(self, llm_kwargs: dict[str, Any]) -> None:
        from vllm import LLM, __version__

        self.version = __version__
        self._llm = LLM(**llm_kwargs)
        self._engine = self._llm.llm_engine
        self._next_id = 0

    def token_ids(self, prompt: list[Any]) -> list[int]:
        """A prompt is token ids, or chat messages that the model's own template turns into them."""
        if prompt and isinstance(prompt[0], dict):
            ids = self._llm.get_tokenizer().apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            return [int(token) for token in ids]
        return prompt

    def add(self, prompt: list[int], sampling: dict[str, Any]) -> str:
        """Hand a request in; its id."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(**sampling, output_kind=RequestOutputKind.DELTA)
        request_id = str(self._next_id)
        self._next_id += 1
        self._engine.add_request(request_id, TokensPrompt(prompt_token_ids=prompt), params)
        return request_id

    def step(self) -> list[tuple[str, list[int], str, str | None]]:
        """Of each request that one engine step brought something for: id, tokens, text, reason of its end."""
        return [
            (
                output.request_id,
                list(output.outputs[0].token_ids),
                output.outputs[0].text,
                output.outputs[0].finish_reason,
            )
            for output in self._engine.step()
        ]

    def abort(self, request_ids: list[str]) -> None:
        self._engine.abort_request(request_ids)

    def generate(
        self, prompts: list[list[Any]], sampling: list[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """Answer all prompts as one batch: first their token ids, then what every engine step brought."""
        ids = [self.token_ids(prompt) for prompt in prompts]
        yield {"event": "start", "prompt_ids": ids}
        start = time.perf_counter()
        added = [self.add(prompt, each) for prompt, each in zip(ids, sampling, strict=True)]
        index_of = {request_id: index for index, request_id in enumerate(added)}
        while self._engine.has_unfinished_requests():
            news = [(index_of[request_id], *rest) for request_id, *rest in self.step()]
            if news:
                yield {
                    "event": "step",
                    "seconds": time.perf_counter() - start,
                    "outputs": news,
                }
        yield {"event": "done"}

    def metrics(self) -> list[dict[str, Any]]:
        found = []
        for metric in self._llm.get_metrics():
            value = getattr(metric, "values", getattr(metric, "value", None))
            if value is not None:
                found.append({"name": metric.name, "labels": metric.labels, "value": value})
        return found


class _Load:
    """Requests in a fixed order, so many at a time: the next one takes the place of each that ended.

    It is answered in turns, a few steps each time the parent asks. Its clock stands still in between.
    """

    def __init__(
        self,
        engine: _Engine,
        prompts: list[list[int]],
        sampling: list[dict[str, Any]],
        at_a_time: int,
    ) -> None:
        self._engine = engine
        self._waiting = deque(enumerate(zip(prompts, sampling, strict=True)))
        self._at_a_time = at_a_time
        self._going: dict[str, int] = {}
        self._clock = 0.0

    def turn(self, seconds: float) -> dict[str, Any]:
        """Steps until they took so long, at least one unless all is answered.

        Outputs are [seconds on the clock, index, tokens, reason of its end]; those that began, [seconds, index].
        """
        began: list[tuple[float, int]] = []
        outputs: list[tuple[float, int, list[int], str | None]] = []
        end = self._clock + seconds
        while self._going or self._waiting:
            before = time.perf_counter()
            while self._waiting and len(self._going) < self._at_a_time:
                index, (prompt, sampling) = self._waiting.popleft()
                self._going[self._engine.add(prompt, sampling)] = index
                began.append((self._clock, index))
            news = self._engine.step()
            self._clock += time.perf_counter() - before
            for request_id, tokens, _, reason in news:
                outputs.append((self._clock, self._going[request_id], tokens, reason))
                if reason is not None:
                    del self._going[request_id]
            if self._clock >= end:
                break
        over = not self._going and not self._waiting
        return {"clock": self._clock, "began": began, "outputs": outputs, "over": over}

    def stop(self) -> None:
        """Leave the rest unanswered."""
        self._waiting.clear()
        if self._going:
            self._engine.abort(list(self._going))
            self._going.clear()


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w") as pipe:
        engine: _Engine | None = None
        load: _Load | None = None
        for line in sys.stdin:
            request = json.loads(line)
            if request["op"] == "start":
                start = time.perf_counter()
                engine = _Engine(request["llm_kwargs"])
                seconds = time.perf_counter() - start
                _reply(pipe, event="ready", seconds=seconds, vllm_version=engine.version)
                continue
            assert engine is not None
            if request["op"] == "generate":
                for event in engine.generate(request["prompts"], request["sampling"]):
                    _reply(pipe, **event)
            elif request["op"] == "tokenize":
                ids = [engine.token_ids(prompt) for prompt in request["prompts"]]
                _reply(pipe, event="tokenized", prompt_ids=ids)
            elif request["op"] == "load":
                load = _Load(engine, request["prompts"], request["sampling"], request["at_a_time"])
            elif request["op"] == "turn":
                assert load is not None
                _reply(pipe, event="turn", **load.turn(request["seconds"]))
            elif request["op"] == "stop":
                assert load is not None
                load.stop()
                _reply(pipe, event="stopped")
            elif request["op"] == "metrics":
                _reply(pipe, event="metrics", metrics=engine.metrics())


if __name__ == "__main__":
    main()
