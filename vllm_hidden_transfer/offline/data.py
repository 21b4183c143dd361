# SPDX-License-Identifier: Apache-2.0
"""Users' files become a corpus: text, chat messages, token ids, Parquet and saved Hugging Face datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_hidden_transfer.offline.cache import Example, is_held_out
from vllm_hidden_transfer.offline.chat import Message, render_chat
from vllm_hidden_transfer.offline.rows import (
    DataError,
    UnfinishedLineError,
    dataset_rows,
    first_problem,
    is_saved_dataset,
    json_lines,
    parquet_rows,
    source_labels,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ABOUT_SUFFIX = ".about.json"
"""What `generate` lays beside the file that it writes; not data."""

SECTION = 256
"""Tokens of a document that are held out together or not at all: enough for a beginning and what is judged."""

_JSON_LINES = (".jsonl", ".json")
_WANTED = (
    "text, or messages, or id, kind, temperature, prompt and answer as `generate` writes them "
    "(prompt and answer are lists of token ids)"
)
# Chat models name the end of a turn as their eos token; documents end with another one.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class Corpus:
    """What `read_corpus` found."""

    examples: list[Example]
    left_out: dict[str, int]
    """How many were left out, by reason."""


class _Row(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Chat(_Row):
    messages: list[Message]


class _Text(_Row):
    text: str | None


class _Tokens(_Row):
    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, Field(min_length=1)]
    kind: str
    temperature: Annotated[float, Field(ge=0)] | None
    prompt: Annotated[list[int], Field(min_length=1)]
    answer: list[int]


def read_corpus(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    min_tokens: int = 16,
    vocab_size: int | None = None,
) -> Corpus:
    """Examples of files and folders, in their order (the files of a folder sorted by name, hidden ones left out).

    - Text files are one document each. Sections of `SECTION` tokens that are held out stand for themselves. What lies
      between them is joined with the tokenizer's end-of-text token and cut into pieces of `max_tokens`, over the
      borders of files; a piece teaches all but its first token.
    - JSON lines (.jsonl, .json) hold `text` (a document), `messages` (see below) or what `generate` wrote; other keys
      beside `text` and `messages` are ignored.
    - Parquet files and saved `datasets` (of a DatasetDict the split train) have a column `messages` or `text`.
    - Every turn of the assistant in `messages` is an example of its own: it teaches the tokens from behind the
      generation prompt to the end of the turn.

    Left out and counted: answers of fewer than `min_tokens` tokens, conversations and answers of more than
    `max_tokens` in all. `vocab_size` is the target's, the tokenizer's unless given.

    Raises:
        DataError: a path is missing, unreadable or not of these forms, token ids are outside the vocabulary,
            there are messages and no chat template, or nothing is left to train on.
    """
    if max_tokens <= min_tokens:
        raise DataError(f"max_tokens is {max_tokens}, but must be over min_tokens, {min_tokens}.")
    reader = _Reader(tokenizer, max_tokens, min_tokens, vocab_size or len(tokenizer))
    for label, path in zip(source_labels(paths), paths, strict=True):
        reader.read(label, Path(path), named=True)
    return reader.finish(paths)


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts before every text, where it does: pieces begin as prompts do."""
    ids = list(tokenizer("a")["input_ids"])
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def _document_end(tokenizer: PreTrainedTokenizerBase) -> int:
    vocabulary = tokenizer.get_vocab()
    ends = [vocabulary[name] for name in _DOCUMENT_ENDS if name in vocabulary]
    ends += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not ends:
        raise DataError(
            "the target's tokenizer has no end-of-text token to join documents with: give it an "
            "eos_token or train on messages."
        )
    return int(ends[0])


class _Reader:
    """Collects examples from one file after another."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, min_tokens: int, vocab_size: int
    ) -> None:
        self._tokenizer = tokenizer
        self._max, self._min, self._vocab_size = max_tokens, min_tokens, vocab_size
        self._examples: list[Example] = []
        self._left_out: Counter[str] = Counter()
        self._seen: set[tuple[str, str]] = set()
        added = tokenizer.added_tokens_decoder
        self._special = {token for token, about in added.items() if about.special}
        self._special.update(tokenizer.all_special_ids)
        self._first = _first_tokens(tokenizer)
        # Text that is not yet enough for a piece, and the file in which it begins.
        self._rest: list[int] = []
        self._rest_label = ""
        self._pieces: Counter[str] = Counter()
        self._joined = False
        self._room = max_tokens - len(self._first)

    @cached_property
    def _document_end(self) -> int:
        return _document_end(self._tokenizer)

    def read(self, label: str, path: Path, *, named: bool) -> None:
        """A file or folder; one that the user `named` himself must be readable, others may be anything."""
        try:
            if path.is_dir() and not is_saved_dataset(path):
                self._folder(label, path)
            elif path.exists():
                self._file(label, path, named)
            else:
                raise DataError(f"the data file {path} does not exist.")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error

    def finish(self, paths: Sequence[str | Path]) -> Corpus:
        """All examples, the last piece of text included."""
        if self._rest:
            self._piece(self._rest_label, self._rest, False)
            self._rest = []
        if not self._examples:
            names = ", ".join(map(str, paths)) or "no data file"
            reasons = ", ".join(f"{count} {why}" for why, count in self._left_out.items())
            raise DataError(
                f"there is nothing to train on in {names} (left out: {reasons or 'nothing'}): "
                "give more or other data."
            )
        return Corpus(self._examples, dict(self._left_out))

    def _folder(self, label: str, folder: Path) -> None:
        for child in sorted(folder.iterdir()):
            # A link to a folder may lead back here.
            linked = child.is_symlink() and child.is_dir()
            if not (linked or child.name.startswith(".") or child.name.endswith(ABOUT_SUFFIX)):
                self.read(f"{label}/{child.name}", child, named=False)

    def _file(self, label: str, path: Path, named: bool) -> None:
        if path.is_dir():
            self._rows(label, path, enumerate(dataset_rows(path), 1))
        elif path.suffix == ".parquet":
            self._rows(label, path, enumerate(parquet_rows(path), 1))
        elif path.suffix in _JSON_LINES:
            self._rows(label, path, json_lines(path), "line")
        else:
            self._text_file(label, path, named)

    def _text_file(self, label: str, path: Path, named: bool) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            if named:
                raise DataError(
                    f"{path} is not UTF-8 text, nor .jsonl, .json or .parquet by its name: convert it."
                ) from error
            self._left_out["files that are not UTF-8 text"] += 1
            return
        self._text(label, text)

    def _rows(
        self,
        label: str,
        path: Path,
        rows: Iterable[tuple[int, dict[str, Any]]],
        unit: str = "row",
    ) -> None:
        fits: Counter[bool] = Counter()
        try:
            for number, row in rows:
                fits.update(
                    self._row(f"{label}#{number}", label, f"{unit} {number} of {path}", row)
                )
        except UnfinishedLineError:
            self._left_out["last lines cut short"] += 1
        if fits[False]:
            self._left_out["turns that the chat template does not set apart"] += fits[False]
        if fits[False] and not fits[True]:
            raise DataError(
                f"in {path} no turn of the assistant can be told apart: the target's chat template "
                "does not put the generation prompt before an answer, token by token, so give "
                "text or what `generate` writes."
            )

    def _row(self, name: str, label: str, where: str, row: dict[str, Any]) -> list[bool]:
        """Take one row; of chat messages, whether each turn began with the generation prompt."""
        try:
            if "prompt" in row and "answer" in row:
                tokens = _Tokens.model_validate(row)
                self._add(Example(**tokens.model_dump()), where)
            elif "messages" in row:
                _Chat.model_validate(row)
                return self._chat(name, where, row["messages"])
            elif "text" in row:
                self._text(label, _Text.model_validate(row).text or "")
            else:
                raise DataError(f"{where} has the keys {sorted(row)}, but needs {_WANTED}.")
        except ValidationError as error:
            raise DataError(
                f"{where} is not valid, {first_problem(error)}; it needs {_WANTED}."
            ) from error
        return []

    def _chat(self, name: str, where: str, messages: list[dict[str, Any]]) -> list[bool]:
        # Parquet gives every message all keys of all messages.
        messages = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        turns = [n for n, message in enumerate(messages) if n and message["role"] == "assistant"]
        if not turns:
            self._left_out["conversations without an answer"] += 1
        fits = []
        kept_out: bool | None = None
        for count, turn in enumerate(turns, 1):
            prompt = render_chat(self._tokenizer, messages[:turn], where, generation_prompt=True)
            if kept_out is None:  # by the first turn, for all of them
                kept_out = is_held_out(prompt)
            whole = render_chat(
                self._tokenizer, messages[: turn + 1], where, generation_prompt=False
            )
            fits.append(whole[: len(prompt)] == prompt)
            if fits[-1]:
                answer = self._up_to_its_end(whole[len(prompt) :])
                self._add(
                    Example(f"{name}@turn-{count}", "chat", None, prompt, answer, kept_out), where
                )
        return fits

    def _up_to_its_end(self, answer: list[int]) -> list[int]:
        """Without the blanks that templates put behind the end of a turn: the target never writes them."""
        behind = sum(1 for _ in takewhile(lambda token: token not in self._special, answer[::-1]))
        end = len(answer) - behind
        if end and not self._tokenizer.decode(answer[end:]).strip():
            return answer[:end]
        return answer

    def _text(self, label: str, text: str) -> None:
        if not text.strip():
            self._left_out["empty documents"] += 1
            return
        # Long documents are what the pieces are cut from: no warning that they are long.
        tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        sections = [tokens[start : start + SECTION] for start in range(0, len(tokens), SECTION)]
        for kept_out, group in groupby(sections, is_held_out):
            if kept_out:
                self._held_out(label, group)
            else:
                self._join(label, [token for section in group for token in section])

    def _held_out(self, label: str, sections: Iterable[list[int]]) -> None:
        for section in sections:
            for start in range(0, len(section), self._room):
                self._piece(label, section[start : start + self._room], True)

    def _join(self, label: str, tokens: list[int]) -> None:
        joint = [self._document_end] if self._joined else []
        self._joined = True
        stream = [*self._rest, *joint, *tokens]
        start_label = self._rest_label if self._rest else label
        whole = len(stream) - len(stream) % self._room
        for start in range(0, whole, self._room):
            self._piece(label if start else start_label, stream[start : start + self._room], False)
        self._rest = stream[whole:]
        self._rest_label = label if whole else start_label

    def _piece(self, label: str, tokens: list[int], kept_out: bool) -> None:
        tokens = self._first + tokens
        number = self._pieces[label]
        self._pieces[label] += 1
        self._add(
            Example(f"{label}#{number}", "text", None, tokens[:1], tokens[1:], kept_out), label
        )

    def _add(self, example: Example, where: str) -> None:
        tokens = example.tokens
        if max(tokens) >= self._vocab_size or min(tokens) < 0:
            outside = next(token for token in tokens if not 0 <= token < self._vocab_size)
            raise DataError(
                f"{where} has the token id {outside}, outside the target's vocabulary of "
                f"{self._vocab_size}: it was made with another tokenizer, so make it again."
            )
        if len(example.answer) < self._min:
            self._left_out[f"shorter than {self._min} tokens"] += 1
        elif len(tokens) > self._max:
            self._left_out[f"longer than {self._max} tokens"] += 1
        elif (example.id, example.digest) in self._seen:
            self._left_out["given twice"] += 1
        else:
            self._seen.add((example.id, example.digest))
            self._examples.append(example)
