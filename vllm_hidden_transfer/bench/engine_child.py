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
from collections.abc import Callable, Iterator
from typing import Any, TextIO


def _reply(pipe: TextIO, **fields: Any) -> None:
    pipe.write(json.dumps(fields) + "\n")
    pipe.flush()


class _Engine:
    def __init__(self, llm_kwargs: dict[str, Any]) -> None:
        from vllm import LLM, __version__

        self.version = __version__
        self._llm = LLM(**llm_kwargs)
        self._next_id = 0

    def _token_ids(self, prompt: list[Any]) -> list[int]:
        """A prompt is token ids, or chat messages that the model's own template turns into them."""
        if prompt and isinstance(prompt[0], dict):
            ids = self._llm.get_tokenizer().apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            return [int(token) for token in ids]
        return prompt

    def generate(
        self,
        prompts: list[list[Any]],
        sampling: list[dict[str, Any]],
        wait: Callable[[], object] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Answer all prompts as one batch: first their token ids, then what every engine step brought.

        `wait` is called before each step."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        index_of: dict[str, int] = {}
        ids = [self._token_ids(prompt) for prompt in prompts]
        yield {"event": "start", "prompt_ids": ids}
        start = time.perf_counter()
        for index, (prompt, parameters) in enumerate(zip(ids, sampling, strict=True)):
            params = SamplingParams(**parameters, output_kind=RequestOutputKind.DELTA)
            request_id = str(self._next_id)
            self._next_id += 1
            index_of[request_id] = index
            engine.add_request(request_id, TokensPrompt(prompt_token_ids=prompt), params)

        def goes_on() -> bool:
            if wait is not None:
                wait()
            return bool(engine.has_unfinished_requests())

        while goes_on():
            before = time.perf_counter()
            outputs = engine.step()
            seconds = time.perf_counter() - start
            spent = time.perf_counter() - before
            news = [
                (
                    index_of[output.request_id],
                    list(output.outputs[0].token_ids),
                    output.outputs[0].text,
                    output.outputs[0].finish_reason,
                )
                for output in outputs
            ]
            if news or wait is not None:
                yield {"event": "step", "seconds": seconds, "spent": spent, "outputs": news}
        yield {"event": "done"}

    def metrics(self) -> list[dict[str, Any]]:
        found = []
        for metric in self._llm.get_metrics():
            value = getattr(metric, "values", getattr(metric, "value", None))
            if value is not None:
                found.append({"name": metric.name, "labels": metric.labels, "value": value})
        return found


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w") as pipe:
        engine: _Engine | None = None
        # Not by iteration, which reads ahead of what `wait` has to see.
        while line := sys.stdin.readline():
            request = json.loads(line)
            if request["op"] == "start":
                start = time.perf_counter()
                engine = _Engine(request["llm_kwargs"])
                seconds = time.perf_counter() - start
                _reply(pipe, event="ready", seconds=seconds, vllm_version=engine.version)
                continue
            assert engine is not None
            if request["op"] == "generate":
                wait = sys.stdin.readline if request["stepwise"] else None
                for event in engine.generate(request["prompts"], request["sampling"], wait):
                    _reply(pipe, **event)
            elif request["op"] == "metrics":
                _reply(pipe, event="metrics", metrics=engine.metrics())


if __name__ == "__main__":
    main()
