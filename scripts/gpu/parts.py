# SPDX-License-Identifier: Apache-2.0
"""Files cut into parts that fit a call, and whole again. Standard library only."""

from __future__ import annotations

import lzma
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

PART_BYTES = 44 << 20
"""A call carries 64 MiB with the working tree, which has 17."""
CHUNK = 1 << 20


class PartsError(Exception):
    """Parts are missing or broken; the message is one sentence."""


def cut(whole: Path, count_name: Path) -> list[Path]:
    """Cut a file into ``NAME.part0``, ...; the last byte of all is in the last part.

    Args:
        whole: is left as it is.
        count_name: folder and name before ``.part``.
    """
    size = whole.stat().st_size
    number = max(1, -(-size // PART_BYTES))
    if number > 9:
        raise PartsError(
            f"{whole.name} has {size >> 20} MiB: more than 9 parts are not provided for."
        )
    parts = []
    with whole.open("rb") as source:
        for index in range(number):
            part = count_name.with_name(f"{count_name.name}.{number}.part{index}")
            part.write_bytes(source.read(PART_BYTES))
            parts.append(part)
    return parts


def found(folder: Path, name: str) -> list[Path]:
    """All parts of a file in their order.

    Raises:
        PartsError: where one is missing.
    """
    parts = sorted(folder.glob(f"{name}.?.part?"))
    wanted = int(parts[0].name.split(".")[-2]) if parts else None
    if wanted is None:
        raise PartsError(f"there is no part of {name} in {folder}: park them with call 2 first.")
    if [part.name[-1] for part in parts] != [str(index) for index in range(wanted)]:
        names = ", ".join(part.name for part in parts)
        raise PartsError(f"{name} has {wanted} parts and {folder} has {names}.")
    return parts


def _bytes(parts: list[Path]) -> Iterator[bytes]:
    for part in parts:
        with part.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk


def join(parts: list[Path], whole: Path) -> None:
    """Write the whole file."""
    with whole.open("wb") as file:
        for chunk in _bytes(parts):
            file.write(chunk)


def unpack(parts: list[Path], folder: Path) -> None:
    """Unpack a .tar.xz into a folder that becomes it only when all of it is there.

    Raises:
        PartsError: where it cannot be.
    """
    scratch = folder.with_name(folder.name + ".making")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    whole = scratch.with_suffix(".tar.xz")
    join(parts, whole)
    try:
        if shutil.which("xz"):  # on all cores
            with subprocess.Popen(
                ["xz", "-T0", "-dc", str(whole)], stdout=subprocess.PIPE
            ) as program:
                assert program.stdout is not None
                with tarfile.open(fileobj=program.stdout, mode="r|") as archive:
                    archive.extractall(scratch, filter="data")
            if program.returncode:
                raise PartsError(f"xz ended with status {program.returncode}.")
        else:
            with tarfile.open(whole, mode="r:xz") as archive:
                archive.extractall(scratch, filter="data")
    except (tarfile.TarError, lzma.LZMAError, OSError, EOFError) as error:
        raise PartsError(f"the kit cannot be unpacked: {error}.") from error
    finally:
        whole.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
