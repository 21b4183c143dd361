# SPDX-License-Identifier: Apache-2.0
"""Rows of users' files, whatever they hold: JSON lines, Parquet and saved Hugging Face datasets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_hidden_transfer.checkpoint.config import one_sentence

_NEEDS_EXTRA = "install what reads it with `pip install 'vllm-hidden-transfer[data]'`."


class DataError(Exception):
    """The data cannot be used; the message is one sentence."""

    def __init__(self, message: str) -> None:
        super().__init__(one_sentence(message))


class UnfinishedLineError(DataError):
    """The last line of a file has no end and is not valid JSON: somebody is writing it, or was killed."""


def source_labels(paths: Sequence[str | Path]) -> list[str]:
    """A name for each path that stands in ids: its last part, numbered where several have the same.

    Raises:
        DataError: a path is given twice.
    """
    labels: list[str] = []
    names: Counter[str] = Counter()
    seen: set[Path] = set()
    for path in paths:
        resolved = Path(path).resolve()
        if resolved in seen:
            raise DataError(f"{path} is given twice: name it once.")
        seen.add(resolved)
        names[resolved.name] += 1
        number = names[resolved.name]
        labels.append(resolved.name if number == 1 else f"{resolved.name}~{number}")
    return labels


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and object of every line that is not blank.

    Raises:
        DataError: a line is no JSON object.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _object(line, f"line {number} of {path}")


def first_problem(error: ValidationError) -> str:
    """Where the first mistake is and what it is."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the whole"
    return f"{where}: {first['msg']}"


def is_saved_dataset(folder: Path) -> bool:
    single = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return single or (folder / "dataset_dict.json").is_file()


def _column(names: Sequence[str], path: Path) -> str:
    """The column to read: messages tell what to teach, so they win."""
    for name in ("messages", "text"):
        if name in names:
            return name
    raise DataError(
        f"{path} has the columns {sorted(names)}, but needs one named text or messages: rename it."
    )


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{path} is a Parquet file: {_NEEDS_EXTRA}") from error
    try:
        with parquet.ParquetFile(path) as file:
            column = _column(file.schema_arrow.names, path)
            for batch in file.iter_batches(columns=[column]):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}).") from error


def dataset_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path} is a saved Hugging Face dataset: {_NEEDS_EXTRA}") from error
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read as a saved dataset ({error}).") from error
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise DataError(
                f"the dataset {path} has the splits {sorted(found)} and no train: name the folder "
                "of one of them."
            )
        found = found["train"]
    yield from found.select_columns([_column(found.column_names, path)])


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            raise UnfinishedLineError(f"{where}, the last one, is cut short: remove it.") from error
        raise DataError(
            f"{where} is not valid JSON ({error}): every line must hold one JSON object."
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{where} holds no JSON object: every line must hold one.")
    return found
