# SPDX-License-Identifier: Apache-2.0
"""What moved in vLLM is seen, on a made-up package; and the installed vLLM is as recorded."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
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
from vllm.engine.parts import Base

LIMIT: int = 3

class Color(Enum):
    RED = "red"

class Engine(Base):
    """Words."""
    size: int = 1

    def __init__(self, model):
        self.batch = Batch(model)

    @functools.cache
    def step(self, tokens, limit=LIMIT):
        """More words."""
        return self.rows(tokens)[:limit]

    def load(self):
        self.weights = None

class Batch:
    def add(self, request): ...
''',
    "vllm/engine/parts.py": """
class Base:
    def rows(self, tokens):
        return list(tokens)
""",
}

OURS = """
class Mixin:
    def extra(self): return self.weights

def late():
    from vllm.engine.core import Color
    return Color.RED

from vllm import Engine

class Ours(Mixin, Engine):
    def step(self, tokens, limit=3):
        self.mine = self.batch
        return self.extra(), super().step(tokens, limit)
"""
RELIED_ON = ["vllm.engine.core.Batch.add", "vllm.Engine.size", "vllm.engine.core.Color.RED"]


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("check_vllm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _no_real_surfaces(
    tool: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "make" in request.fixturenames:
        monkeypatch.setattr(tool, "SURFACES", {"vllm.Engine.step": ("tokens", "limit")})


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write the made-up vLLM with some files replaced."""

    def write(changed: dict[str, str] | None = None) -> Path:
        folder = tmp_path / "site"
        shutil.rmtree(folder, ignore_errors=True)
        for name, text in {**FAKE, **(changed or {})}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return folder

    return write


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A package of ours over the made-up vLLM."""
    package = tmp_path / "repository" / "ours"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "file.py").write_text(OURS)
    return package


def replaced(old: str, new: str, file: str = "vllm/engine/core.py") -> dict[str, str]:
    assert old in FAKE[file]
    return {file: FAKE[file].replace(old, new)}


def moved(
    tool: Any, make: Make, ours: Path, changed: dict[str, str], relied_on: list[str] = RELIED_ON
) -> list[Any]:
    was, moves = tool.look_up(tool.Sources(make(), relied_on, ours), {})
    assert {move.kind for move in moves} <= {"unrecorded", "taken"}
    found: list[Any] = tool.look_up(tool.Sources(make(changed), relied_on, ours), was)[1]
    return found


def test_seams_are_found_in_our_sources(tool: Any, make: Make, ours: Path) -> None:
    seams = tool.Sources(make(), RELIED_ON, ours).seams()
    assert {name for name, by_us in seams.items() if not by_us} == {
        "vllm.Engine",
        "vllm.Engine.size",
        "vllm.Engine.step",  # a surface
        "vllm.engine.core.Engine.batch",
        "vllm.engine.core.Engine.weights",
        "vllm.engine.core.Color",
        "vllm.engine.core.Color.RED",
        "vllm.engine.core.Batch.add",
    }
    assert {name.rpartition(".")[2] for name, by_us in seams.items() if by_us} == {
        "step",
        "extra",
        "mine",
    }


def test_names_are_followed_to_their_definitions(tool: Any, make: Make, ours: Path) -> None:
    sources = tool.Sources(make(), ["vllm.Engine.rows"], ours)
    core, parts = "vllm/engine/core.py", "vllm/engine/parts.py"
    assert sources.find("vllm.Engine").file == core  # through two re-exports
    assert sources.find("vllm.Engine.rows").file == parts  # through a base class
    assert sources.find("vllm.Engine.weights").file == core  # set in a method
    step = sources.find("vllm.Engine.step")
    assert step.signature == "@functools.cache step(tokens, limit=LIMIT)"
    assert step.parameters == ("self", "tokens", "limit")
    assert sources.find("vllm.Engine").signature == "class (Base) Engine(model)"
    for absent in ("vllm.Engine.mine", "vllm.no_such_module.name", "vllm.Engine.no.such"):
        assert sources.find(absent) is None
    assert tool.Entry.read(str(step)) == step._replace(parameters=())


@pytest.mark.parametrize(
    "changed",
    [
        replaced("More words.", "Other words."),
        replaced("return self.rows(tokens)[:limit]", "return (self.rows(tokens) [:limit])  # so"),
        replaced("Batch(model)\n", "Batch(model)\n\n    def unused(self): ...\n"),
        {"vllm/unrelated.py": "x = 1\n"},
        {"vllm/unrelated/__init__.py": "", "vllm/unrelated/broken.py": "def"},
    ],
    ids=["docstring", "format and comment", "a method that we do not use", "a file", "not read"],
)
def test_what_does_not_matter_is_no_move(
    tool: Any, make: Make, ours: Path, changed: dict[str, str]
) -> None:
    assert moved(tool, make, ours, changed) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (replaced("[:limit]", "[:limit - 1]"), {"body": {"step"}}),
        (replaced("limit=LIMIT", "limit=None"), {"signature": {"step"}}),
        (replaced("@functools.cache", "@staticmethod"), {"signature": {"step"}}),
        (
            replaced("tokens, limit=LIMIT", "tokens, most"),
            {"signature": {"step"}, "parameters": {"step"}},
        ),
        (replaced("def step", "def run"), {"missing": {"step"}}),
        (replaced("def add", "def put"), {"missing": {"add"}}),
        (replaced("self.weights", "self.params"), {"missing": {"weights"}}),
        (replaced("size: int = 1", "size: int = 2"), {"body": {"Engine", "size"}}),
        (replaced('RED = "red"', 'RED = "r"'), {"body": {"Color", "RED"}}),
        (replaced("(self, model)", "(self, model, seed=0)"), {"signature": {"Engine"}}),
        (replaced("def load", "def extra", "vllm/engine/core.py"), {"taken": {"extra"}}),
        (replaced("def rows", "def mine", "vllm/engine/parts.py"), {"taken": {"mine"}}),
        (
            {
                "vllm/engine/core.py": FAKE["vllm/engine/core.py"].split("class Batch")[0]
                + "from vllm.engine.batches import Batch\n",
                "vllm/engine/batches.py": "class Batch"
                + FAKE["vllm/engine/core.py"].split("class Batch")[1],
            },
            {"moved": {"add"}},
        ),
    ],
    ids=[
        "body",
        "default",
        "decorator",
        "parameter",
        "override",
        "read",
        "set in a method",
        "field",
        "enum",
        "init",
        "taken",
        "taken by a base",
        "file",
    ],
)
def test_what_moved_is_named(
    tool: Any, make: Make, ours: Path, changed: dict[str, str], expected: dict[str, set[str]]
) -> None:
    found: dict[str, set[str]] = {}
    for move in moved(tool, make, ours, changed):
        found.setdefault(move.kind, set()).add(move.seam.rpartition(".")[2])
    assert found == expected


def test_a_changed_signature_is_shown_both_ways(tool: Any, make: Make, ours: Path) -> None:
    moves = moved(tool, make, ours, replaced("limit=LIMIT", "limit=None"))
    assert moves
    for move in moves:
        was, now = move.detail.splitlines()
        assert "limit=LIMIT" in was
        assert "limit=None" in now


def test_recorded_then_compared(
    tool: Any, make: Make, ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Record two versions; compare each with its own and an unknown one with the baseline."""
    newer = {
        **replaced("[:limit]", "[:limit - 1]"),
        "vllm/_version.py": "__version__ = version = '0.33.0'\n",
    }
    record: dict[str, Any] = {"relied_on": RELIED_ON, "versions": {}}
    with pytest.raises(tool.CheckError, match="not recorded"):
        tool.check(str(make()), record, ours=ours)
    assert tool.check(str(make()), record, write=True, ours=ours)
    assert tool.check(str(make(newer)), record, write=True, ours=ours)
    record = json.loads(json.dumps(record))
    assert set(record["versions"]) == {"0.32.0", "0.33.0"}
    assert "vllm.engine.core.Engine.mine" not in record["versions"]["0.32.0"]
    capsys.readouterr()

    assert tool.check(str(make()), record, ours=ours)
    printed = capsys.readouterr().out
    assert ": as recorded" in printed
    assert "Engine.step" not in printed

    assert tool.check(str(make(newer)), record, ours=ours)  # as recorded, and told what moved
    printed = capsys.readouterr().out
    assert "vLLM 0.33.0 against 0.32.0" in printed
    assert "vllm.Engine.step" in printed
    assert "refuses" in printed

    newest = {**newer, "vllm/_version.py": "__version__ = version = '0.34.0'\n"}
    assert not tool.check(str(make(newest)), record, ours=ours)
    assert "vllm.Engine.step" in capsys.readouterr().out

    del record["versions"]["0.32.0"]["vllm.Engine.size"]
    assert not tool.check(str(make()), record, ours=ours)
    assert "--record" in capsys.readouterr().out


def test_a_download_keeps_the_sources_only(
    tool: Any, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip's place is taken by a copy of a wheel; the second time nothing is downloaded."""
    site = make({"vllm/big.so": "binary", "other/file.py": ""})
    calls: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        target = Path(command[command.index("--dest") + 1]) / "vllm-0.9.9-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as archive:
            for file in site.rglob("*.*"):
                archive.write(file, file.relative_to(site))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        folder = tool.sources_of_version("0.9.9")
    (command,) = calls
    assert "vllm==0.9.9" in command
    kept = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert kept == set(FAKE)

    def broken_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        said = "ERROR: long\nERROR: no such thing\nWARNING: x"
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(subprocess, "run", broken_pip)
    with pytest.raises(tool.CheckError, match=r"\(no such thing\)"):
        tool.sources_of_version("0.9.8")
    assert [path.name for path in folder.parent.iterdir()] == ["0.9.9"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "holds no vllm/__init__.py"),
        ({"vllm/__init__.py": ""}, "does not say"),
        ({"vllm/__init__.py": "def"}, "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(
    tool: Any, files: dict[str, str], expected: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    app = typer.Typer()
    app.command()(tool.main)
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1


def test_vllm_is_not_imported() -> None:
    code = (
        f"import runpy, sys; sys.argv = ['check', {str(ROOT / 'docs')!r}]\n"
        f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 2\n"
        "print(sorted({'vllm', 'torch'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_the_installed_vllm_is_as_recorded(tool: Any) -> None:
    """Fails when vLLM or our use of it changed: look at what moved, then
    ``python scripts/check_vllm.py 0.32.0 0.33.0 --record``."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    folder = Path(spec.origin).parents[1]
    record = json.loads(tool.RECORD.read_text())
    assert set(record["versions"]) == {"0.32.0", "0.33.0"}
    makefile = (ROOT / "Makefile").read_text()
    assert f"check_vllm.py {' '.join(sorted(record['versions']))}" in makefile

    sources = tool.Sources(folder, record["relied_on"])
    seams = sources.seams()
    # What matters most is found in our sources, not only in the lists.
    runner = "vllm.v1.worker.cpu_model_runner.CPUModelRunner"
    assert seams[f"{runner}._prepare_inputs"]  # an override
    assert "vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder.build" in seams
    assert not seams[f"{runner}.input_batch"]
    assert "vllm.engine.arg_utils.EngineArgs.create_engine_config" in seams
    now, moves = tool.look_up(sources, record["versions"][tool.version_in(folder)])
    assert moves == []
    # No version was recorded with fewer seams than we use now.
    for version in record["versions"].values():
        assert {name for name, ours in seams.items() if not ours} <= set(version)
    assert set(now) <= set(seams)
