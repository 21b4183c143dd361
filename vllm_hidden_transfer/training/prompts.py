# SPDX-License-Identifier: Apache-2.0
"""Users' prompts become the requests that `generate` asks the engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_hidden_transfer.offline.cache import is_held_out
from vllm_hidden_transfer.offline.chat import Message, render_chat
from vllm_hidden_transfer.offline.rows import DataError, first_problem, json_lines, source_labels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """One prompt; `content` is text or chat messages."""

    id: str
    kind: str
    content: str | list[dict[str, str]]


@dataclass(frozen=True)
class Request:
    """One prompt as the engine gets it."""

    id: str
    kind: str
    temperature: float
    seed: int
    tokens: list[int]


class _PromptRow(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, Field(min_length=1)] | None = None
    kind: str = "chat"
    prompt: Annotated[str, Field(pattern=r"\S")] | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _has_one(self) -> _PromptRow:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("one of prompt and messages must be given")
        return self


def read_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """Prompts of .jsonl and .txt files, in their order; without an id of its own a prompt is FILE#LINE.

    Raises:
        DataError: a file is missing or not of this form, or an id comes twice.
    """
    prompts: dict[str, Prompt] = {}
    for label, path in zip(source_labels(paths), paths, strict=True):
        try:
            for prompt in _prompts_of(label, path):
                if prompt.id in prompts:
                    raise DataError(
                        f"the prompt id {prompt.id!r} comes twice: rename one (in {path})."
                    )
                prompts[prompt.id] = prompt
        except OSError as error:
            raise DataError(
                f"the prompts {path} cannot be read ({error.strerror or error})."
            ) from error
    if not prompts:
        raise DataError(f"there is no prompt in {', '.join(map(str, paths))}: give some.")
    return list(prompts.values())


def requests_of(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    temperatures: Sequence[float],
    seed: int,
) -> list[Request]:
    """What to ask the engine: the prompts take turns between the temperatures, the i-th has the seed `seed + i`.

    Prompts whose answers `train` will hold out take turns among themselves: of 150 prompts they are a handful, and
    chance could leave them without a greedy one to judge.

    A prompt that is text becomes the user's message where the tokenizer has a chat template, and is continued as it is
    where it has none.

    Raises:
        DataError: messages without a template, or the template refuses them.
    """
    turns = {held_out: itertools.cycle(temperatures) for held_out in (False, True)}
    tokens = [_tokens_of(prompt, tokenizer) for prompt in prompts]
    return [
        Request(
            id=prompt.id,
            kind=prompt.kind,
            temperature=next(turns[is_held_out(asked)]),
            seed=seed + number,
            tokens=asked,
        )
        for number, (prompt, asked) in enumerate(zip(prompts, tokens, strict=True))
    ]


def _prompts_of(label: str, path: Path) -> Iterator[Prompt]:
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"the prompts {path} are not UTF-8 text: convert the file.") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Prompt(f"{label}#{number}", "chat", line.strip())
    elif path.suffix == ".jsonl":
        for number, row in json_lines(path):
            yield _prompt(f"{label}#{number}", f"line {number} of {path}", row)
    else:
        raise DataError(f"the prompts {path} are neither .jsonl nor .txt by their name: rename it.")


def _prompt(default_id: str, where: str, row: dict[str, Any]) -> Prompt:
    try:
        found = _PromptRow.model_validate(row)
    except ValidationError as error:
        raise DataError(
            f"{where} is not valid, {first_problem(error)}; it needs prompt or messages and may have id and kind."
        ) from error
    content: str | list[dict[str, str]] = found.prompt or ""
    if found.messages is not None:
        messages = list(row["messages"])
        # An answer at the end is somebody else's: the target writes its own.
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError(f"{where} has no message before the assistant's: remove it.")
        content = messages
    return Prompt(found.id or default_id, found.kind, content)


def _tokens_of(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(prompt.content, str) and not tokenizer.chat_template:
        return list(tokenizer(prompt.content, verbose=False)["input_ids"])
    messages = prompt.content
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return render_chat(tokenizer, messages, f"the prompt {prompt.id}", generation_prompt=True)
