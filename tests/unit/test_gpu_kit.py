# SPDX-License-Identifier: Apache-2.0
"""The scripts for a GPU machine, as far as they go without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "scripts" / "gpu"
CALLS = sorted(KIT.glob("call?_*"))
MEASURING = [path for path in CALLS if path.suffix == ".py"]

slow = pytest.mark.slow


def answer(path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a script says on a machine without a GPU."""
    program = sys.executable if path.suffix == ".py" else "bash"
    return subprocess.run(
        [program, str(path), *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_every_call_has_its_script() -> None:
    assert [path.name[:5] for path in CALLS] == [f"call{number}" for number in range(1, 8)]


def test_the_page_names_files_that_exist() -> None:
    page = (KIT / "README.md").read_text()
    named = set(re.findall(r"scripts/gpu/[\w.]+", page))
    assert {f"scripts/gpu/{path.name}" for path in CALLS} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_calls_end_before_the_device_tool_ends_them() -> None:
    page = (KIT / "README.md").read_text()
    rows = re.findall(r"^\| (\d) \| (\d+) \| (\d+) \|.*`(.*)` \|$", page, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, 8))
    for (_, expected, limit, command), path in zip(rows, CALLS, strict=True):
        assert int(expected) < int(limit) <= 600
        assert f"scripts/gpu/{path.name}" in command
        own = re.search(r"^LIMIT = (\d+)$", path.read_text(), re.MULTILINE)
        assert own is None or int(own[1]) + 10 <= int(limit)


def test_parts_come_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(KIT))
    import parts

    monkeypatch.setattr(parts, "PART_BYTES", 10)
    whole = tmp_path / "whole"
    whole.write_bytes(bytes(range(25)))
    made = parts.cut(whole, tmp_path / "kit")
    assert [path.name for path in made] == [f"kit.3.part{index}" for index in range(3)]
    parts.join(parts.found(tmp_path, "kit"), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == whole.read_bytes()
    made[1].unlink()
    with pytest.raises(parts.PartsError, match="has 3 parts and"):
        parts.found(tmp_path, "kit")
    with pytest.raises(parts.PartsError, match="there is no part"):
        parts.found(tmp_path, "other")


@slow
@pytest.mark.parametrize("path", [*CALLS, KIT / "pack.py"], ids=lambda path: path.stem)
def test_help(path: Path) -> None:
    found = answer(path, "--help")
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) >= 2


@slow
@pytest.mark.parametrize("path", MEASURING, ids=lambda path: path.stem)
def test_no_gpu_is_one_sentence(path: Path, tmp_path: Path) -> None:
    found = answer(path, OUT=str(tmp_path))
    assert found.returncode == 1
    assert re.fullmatch(r"call \d: there is no GPU here, so nothing was measured.\n", found.stderr)
    assert list(tmp_path.iterdir()) == []


@slow
def test_parts_are_parked(tmp_path: Path) -> None:
    script = tmp_path / "scripts" / "gpu" / "call2_carry.sh"
    script.parent.mkdir(parents=True)
    script.write_text((KIT / script.name).read_text())
    room = tmp_path / "elsewhere"
    room.mkdir()
    found = answer(script, TMPDIR=str(room))
    assert (found.returncode, found.stderr.count("\n")) == (1, 1)
    part = tmp_path / "work" / "gpu-kit" / "kit.tar.xz.1.part0"
    part.parent.mkdir(parents=True)
    part.write_text("part")
    found = answer(script, TMPDIR=str(room))
    assert found.returncode == 0, found.stderr
    assert (room / "hidden-transfer-gpu" / part.name).read_text() == "part"
    assert not part.exists()


@slow
def test_kernels_under_the_interpreter(tmp_path: Path) -> None:
    found = answer(KIT / "call1_kernels.py", "--quick", OUT=str(tmp_path), TRITON_INTERPRET="1")
    assert found.returncode == 0, found.stderr
    assert "random cases: 3 right, 0 wrong, of 3" in found.stdout
    assert "FAILED" not in found.stdout
    assert "best / floor" in found.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"call1_kernels{end}" for end in (".txt", ".jsonl", ".log")}
