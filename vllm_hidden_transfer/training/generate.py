# SPDX-License-Identifier: Apache-2.0
"""Self-distillation: stock vLLM answers prompts offline, and the maps learn from what the target itself writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_hidden_transfer.checkpoint.config import one_sentence
from vllm_hidden_transfer.checkpoint.fingerprint import FingerprintError, fingerprint_target
from vllm_hidden_transfer.checkpoint.maps import write_atomically
from vllm_hidden_transfer.offline.cache import Example
from vllm_hidden_transfer.offline.data import ABOUT_SUFFIX
from vllm_hidden_transfer.offline.rows import first_problem
from vllm_hidden_transfer.training.prompts import Request, read_prompts, requests_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU_KV_CACHE_BYTES = 2 << 30
_RECORD_START = b'{"id": '


class GenerateError(Exception):
    """Generating cannot start or go on; the message is one sentence."""

    def __init__(self, message: str) -> None:
        super().__init__(one_sentence(message))


class GenerateSettings(BaseModel):
    """Settings of one output file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    target: str = Field(min_length=1, description="folder or hub id of the target")
    prompts: tuple[Path, ...] = Field(
        min_length=1,
        description=".jsonl with prompt (or messages) and, if you like, id and kind; or .txt, one prompt a line",
    )
    output: Path = Field(
        description="JSONL file of answers; appended to, so stop and go on as you like"
    )
    temperatures: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = Field(
        default=(0.0, 0.8), description="the prompts take turns between these; 0 is greedy"
    )
    max_tokens: PositiveInt = Field(default=160, description="tokens of an answer at most")
    batch: PositiveInt = Field(default=100, description="prompts per batch: a kill loses one batch")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="dtype of the target; float32 is faster on CPUs without AMX or AVX-512 bf16",
    )
    max_model_len: PositiveInt | None = Field(
        default=None,
        description="tokens of prompt and answer at most; what the prompts need unless given",
    )
    kv_cache_memory_bytes: PositiveInt | None = Field(
        default=None,
        description="memory for the KV cache; on a CPU 2 GiB, on a GPU vLLM's choice unless given",
    )
    seed: NonNegativeInt = Field(
        default=20261121, description="the n-th prompt is sampled with seed + n"
    )
    limit: PositiveInt | None = Field(default=None, description="answer only the first prompts")


Answer = Callable[[Sequence[Request]], list[list[int]]]
"""Token ids of the answers to a batch."""
Start = Callable[[GenerateSettings, int], Answer]
"""Starts an engine for settings and the longest sequence in tokens."""


class _About(BaseModel):
    """The settings that an output file was begun with: another mixture needs another file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    target: str
    temperatures: tuple[float, ...]
    seed: int
    max_tokens: int


def answered(output: Path) -> dict[str, list[int]]:
    """Prompt ids that `output` already answers, and their tokens.

    A last line that was cut short by a kill is removed from the file.

    Raises:
        GenerateError: it is not a file of answers.
        OSError: it cannot be read or written.
    """
    if not output.exists():
        return {}
    foreign = GenerateError(
        f"{output} is there and is not a file of answers: name another --output or move it away."
    )
    data = output.read_bytes()
    end = data.rfind(b"\n") + 1
    tail = data[end:]
    # Whatever else it may be: what others wrote is not cut.
    if tail[: len(_RECORD_START)] != _RECORD_START[: len(tail)]:
        raise foreign
    try:
        examples = [Example(**json.loads(line)) for line in data[:end].splitlines()]
    except (ValueError, TypeError) as error:
        raise foreign from error
    if tail:
        os.truncate(output, end)
    return {example.id: example.prompt for example in examples}


def generate(settings: GenerateSettings, console: Console, start: Start | None = None) -> None:
    """Answer the prompts that the output file does not have yet; the file grows by a batch at a time.

    Raises:
        DataError: the prompts cannot be used.
        GenerateError: the target, the output file or vLLM cannot.
    """
    prompts = read_prompts(settings.prompts)[: settings.limit]
    try:
        tokenizer = _load_tokenizer(settings.target)
        requests = requests_of(prompts, tokenizer, settings.temperatures, settings.seed)
        done = _continue(settings)
        missing = [request for request in requests if not _is_done(request, done, settings)]
        console.print(
            f"{len(requests) - len(missing)} of {len(requests)} prompts are answered in {settings.output}"
        )
        if missing:
            answer = (start or start_vllm)(settings, _model_length(settings, requests))
            _write(settings, missing, answer, console, len(requests))
    except OSError as error:
        reason = error.strerror or error
        raise GenerateError(f"{settings.output} cannot be written ({reason}).") from error


def start_vllm(settings: GenerateSettings, model_length: int) -> Answer:
    """Stock vLLM in this process.

    Raises:
        GenerateError: it is not installed, or does not start with this target.
    """
    # With its default process layout vLLM keeps a core free: one process, every core.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # In a process of its own the engine spins on a core while it waits for its worker.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_PLUGINS"] = ""  # stock vLLM writes the data
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise GenerateError(
            f"vLLM cannot be imported ({error}): pip install 'vllm-hidden-transfer[cuda]' or [cpu]."
        ) from error
    options: dict[str, Any] = {"kv_cache_memory_bytes": settings.kv_cache_memory_bytes}
    if current_platform.is_cpu():
        options = {
            # vLLM's own default wants 92% of the machine's memory to be free.
            "kv_cache_memory_bytes": settings.kv_cache_memory_bytes or CPU_KV_CACHE_BYTES,
            "enforce_eager": True,
            # A seeded request whose prefill is cut into chunks fails in vLLM 0.32 on CPU.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(1 << 15, model_length, settings.batch),
        }
    try:
        llm = LLM(
            model=settings.target,
            dtype=settings.dtype,
            max_model_len=model_length,
            max_num_seqs=settings.batch,
            seed=settings.seed,
            **options,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise GenerateError(f"vLLM does not start with {settings.target} ({error}).") from error

    return answer_with(llm, settings)


def answer_with(llm: Any, settings: GenerateSettings) -> Answer:
    """Ask a `vllm.LLM`."""
    from vllm import SamplingParams

    def answer(requests: Sequence[Request]) -> list[list[int]]:
        outputs = llm.generate(
            [{"prompt_token_ids": request.tokens} for request in requests],
            [
                SamplingParams(
                    temperature=request.temperature,
                    seed=request.seed,
                    max_tokens=settings.max_tokens,
                    detokenize=False,
                )
                for request in requests
            ],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    return answer


def _load_tokenizer(target: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise GenerateError(
            f"there is no tokenizer in {target} ({error}): name a target's folder or hub id."
        ) from error


def _model_length(settings: GenerateSettings, requests: Sequence[Request]) -> int:
    """Longest sequence in tokens that the engine must be ready for."""
    longest = max(requests, key=lambda request: len(request.tokens))
    length = len(longest.tokens)
    limit = settings.max_model_len or _positions(settings.target)
    if limit is not None and length >= limit:
        raise GenerateError(
            f"the prompt {longest.id} has {length} tokens, but prompt and answer may have {limit} in "
            "all: shorten or remove it."
        )
    wanted = length + settings.max_tokens
    return settings.max_model_len or min(wanted, limit or wanted)


def _positions(target: str) -> int | None:
    """The target's longest sequence, where its configuration says one."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(target).get_text_config()
    except (OSError, ValueError) as error:
        raise GenerateError(f"{target} has no usable config.json ({error}).") from error
    return getattr(config, "max_position_embeddings", None)


def _continue(settings: GenerateSettings) -> dict[str, list[int]]:
    """What the output file already answers, if it was begun with these settings.

    A file without a note of its settings gets one: earlier versions wrote none.
    """
    output = settings.output
    sidecar = output.with_name(output.name + ABOUT_SUFFIX)
    about = _about(settings)
    done = answered(output)
    if done and sidecar.exists():
        _compare(about, sidecar, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(sidecar, about.model_dump_json(indent=2).encode() + b"\n")
    return done


def _about(settings: GenerateSettings) -> _About:
    target = settings.target
    if Path(target).is_dir():
        try:
            target = fingerprint_target(target)
        except FingerprintError as error:
            raise GenerateError(str(error)) from error
    return _About(
        target=target,
        temperatures=settings.temperatures,
        seed=settings.seed,
        max_tokens=settings.max_tokens,
    )


def _compare(about: _About, sidecar: Path, output: Path) -> None:
    try:
        before = _About.model_validate_json(sidecar.read_bytes())
    except ValidationError as error:
        raise GenerateError(
            f"{sidecar} is damaged ({first_problem(error)}): remove it if {output} was written with "
            "this target and these settings."
        ) from error
    for name in _About.model_fields:
        old, new = getattr(before, name), getattr(about, name)
        if old != new:
            raise GenerateError(
                f"{output} was begun with another {name.replace('_', ' ')} ({old}, now {new}): "
                "name another --output."
            )


def _is_done(request: Request, done: dict[str, list[int]], settings: GenerateSettings) -> bool:
    if request.id not in done:
        return False
    if done[request.id] != request.tokens:
        raise GenerateError(
            f"the prompt {request.id} was another text when {settings.output} answered it: give it "
            "another id or name another --output."
        )
    return True


def _write(
    settings: GenerateSettings,
    requests: Sequence[Request],
    answer: Answer,
    console: Console,
    total: int,
) -> None:
    """Answer the requests batch by batch; `total` counts the ones that are done already too."""
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        settings.output.open("a", encoding="utf-8") as file,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("answers", total=total, completed=total - len(requests))
        for first in range(0, len(requests), settings.batch):
            batch = requests[first : first + settings.batch]
            for request, tokens in zip(batch, answer(batch), strict=True):
                example = Example(
                    request.id, request.kind, request.temperature, request.tokens, tokens
                )
                file.write(json.dumps(example.record) + "\n")
            file.flush()
            progress.advance(task, len(batch))
