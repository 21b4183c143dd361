# SPDX-License-Identifier: Apache-2.0
"""Engines for tests: real vLLM in this process, small caches, one at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tests.doubles import planted
from tests.support.models import VOCABULARY
from vllm_hidden_transfer.bench.engine_process import (
    EngineProcess,
    SpecCounters,
    spec_counters,
)
from vllm_hidden_transfer.bench.identity import Judgement, TransformersReference, judge, parting

PLANTED = "tests.doubles.planted:PlantedSource"


SMALL: Mapping[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 28,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "block_size": 32,
    "disable_log_stats": False,
}
"""Options of an engine for tests."""
NOTHING: Mapping[str, str] = {}


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """A ``vllm.LLM`` on tokens, closed on the way out."""
    from vllm import LLM

    llm = LLM(**{"model": str(model), **SMALL, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def planted_options(budget: int, source: str = PLANTED) -> dict[str, Any]:
    """Engine options that serve with planted drafts."""
    return {
        "speculative_config": {"method": "hidden_transfer", "num_speculative_tokens": budget},
        "additional_config": {"hidden_transfer": {"draft_source": source}},
    }


def random_prompts(
    count: int,
    seed: int = 0,
    longest: int = 90,
    lengths: Sequence[int] | None = None,
    vocabulary: int = VOCABULARY,
) -> list[list[int]]:
    """Prompts of random tokens, of random or given lengths."""
    rng = np.random.default_rng(seed)
    sizes = lengths or [int(rng.integers(5, longest)) for _ in range(count)]
    return [rng.integers(3, vocabulary, size).tolist() for size in sizes]


@dataclass(frozen=True)
class Texts:
    """What an engine answered: token ids of each prompt."""

    prompts: Sequence[Sequence[int]]
    outputs: list[list[int]]

    def plant(self, path: Path, vocabulary: int = VOCABULARY) -> None:
        """Let planted draft sources know these answers."""
        sequences = [
            [*prompt, *output] for prompt, output in zip(self.prompts, self.outputs, strict=True)
        ]
        planted.write_answers(path, sequences, vocabulary)


def generate(
    llm: Any, prompts: Sequence[Sequence[int]], *, group: int | None = None, **sampling: Any
) -> Texts:
    """Complete the prompts, ``group`` at a time (all at once where it is None)."""
    from vllm import SamplingParams

    params = SamplingParams(
        **{"temperature": 0.0, "ignore_eos": True, "detokenize": False, **sampling}
    )
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    size = group or len(requests)
    groups = [requests[start : start + size] for start in range(0, len(requests), size)]
    outputs = [
        list(answer.outputs[0].token_ids)
        for together in groups
        for answer in llm.generate(together, params, use_tqdm=False)
    ]
    return Texts(prompts, outputs)


def counters_of(llm: Any) -> SpecCounters:
    """vLLM's speculative counters at this moment."""
    return spec_counters(
        [
            {
                "name": metric.name,
                "value": getattr(metric, "values", 0) or getattr(metric, "value", 0),
            }
            for metric in llm.get_metrics()
            if "spec_decode" in metric.name
        ]
    )


def acceptance_length(texts: Texts, counters: SpecCounters) -> float:
    """Output tokens after the first, per decode pass, over all requests.

    A pass gives its accepted tokens and one more, so passes = tokens after the first - accepted.
    Drafts that were accepted behind the end of a text make this an estimate within a pass.
    """
    tokens = sum(len(output) - 1 for output in texts.outputs)
    return tokens / max(tokens - counters.accepted_tokens, 1)


def differences(reference: Texts, texts: Texts) -> list[tuple[int, int]]:
    """(prompt, first differing token) of every text that is not the reference's."""
    pairs = zip(reference.outputs, texts.outputs, strict=True)
    places = [(index, parting(*pair)) for index, pair in enumerate(pairs)]
    return [(index, place) for index, place in places if place is not None]


def assert_identical(
    reference: Texts,
    texts: Texts,
    target: Path,
    environment: Mapping[str, str] = NOTHING,
    **options: Any,
) -> Judgement:
    """No text is wrong against the reference's, as `bench.identity` judges; what parted is printed.

    options: those of the engine that gave the reference, which is started again, in a process of its own, where a text
    has parted by rounding and the rest of it must be asked again.
    environment: what that process needs besides.
    """
    dtype = {**SMALL, **options}["dtype"]
    with Asker(target, environment, **options) as again:
        found = judge(
            reference.prompts,
            reference.outputs,
            texts.outputs,
            TransformersReference(target, dtype),
            again.ask,
        )
    print(found)
    assert found.wrong == ()
    return found


class Asker(ExitStack):
    """vLLM without speculation, started when it is first asked."""

    def __init__(
        self, target: Path, environment: Mapping[str, str] = NOTHING, **options: Any
    ) -> None:
        super().__init__()
        self._options = {"model": str(target), **SMALL, **options}
        self._environment = {"VLLM_PLUGINS": "", **environment}
        self._engine: EngineProcess | None = None

    def ask(self, prefixes: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """Continue each prefix greedily by exactly so many tokens."""
        if self._engine is None:
            folder = Path(self.enter_context(TemporaryDirectory()))
            self._engine = self.enter_context(
                EngineProcess("stock", self._options, folder / "stock.log", self._environment)
            )
        common = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
        sampling = [{**common, "max_tokens": length} for length in lengths]
        return [answer.token_ids for answer in self._engine.generate(prefixes, sampling)]
