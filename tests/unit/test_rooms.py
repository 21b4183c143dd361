# SPDX-License-Identifier: Apache-2.0
"""Imports point one way: no circle between files, and every room stands on the rooms below it only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_hidden_transfer"

BELOW: dict[str, set[str]] = {
    "checkpoint": set(),
    "tree": set(),
    "drafting": {"checkpoint", "tree"},
    "offline": {"checkpoint"},
    "patches": {"checkpoint"},
    "engine": {"checkpoint", "drafting", "patches", "tree"},
    "evaluation": {"checkpoint", "drafting", "offline", "tree"},
    "training": {"checkpoint", "drafting", "evaluation", "offline", "tree"},
    "bench": {"checkpoint", "drafting", "engine", "tree"},
    "cli": {"bench", "checkpoint", "evaluation", "offline", "training"},
}
"""What each room may import besides the modules beside the rooms."""


def modules() -> dict[str, Path]:
    """Every module of the package, patches included, by its name."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "patches", f"{PACKAGE}.patches")):
        for path in folder.rglob("*.py"):
            parts = list(path.relative_to(folder).with_suffix("").parts)
            name = ".".join([prefix, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


def imports(path: Path, known: dict[str, Path], *, lazy: bool) -> Iterator[str]:
    """Modules of ours that a module imports, those for type checkers left out; `lazy` counts imports in functions."""
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree) if lazy else tree.body:
        if not isinstance(node, ast.ImportFrom) or id(node) in typing or not node.module:
            continue
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            if whole in known or node.module in known:
                yield whole if whole in known else node.module


def test_no_circle_between_files() -> None:
    known = modules()
    assert len(known) > 90
    graph = {name: {*imports(path, known, lazy=False)} - {name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("one", BELOW)
def test_a_room_stands_on_those_below(one: str) -> None:
    known = modules()
    used = {
        room(name)
        for mine, path in known.items()
        if room(mine) == one
        for name in imports(path, known, lazy=True)
    }
    assert used & BELOW.keys() - {one} <= BELOW[one]


@pytest.mark.parametrize("one", ["checkpoint", "tree", "drafting", "offline"])
def test_the_maths_knows_no_vllm(one: str) -> None:
    for name, path in modules().items():
        if room(name) == one:
            assert "import vllm\n" not in path.read_text()
            assert "from vllm." not in path.read_text()


def test_what_ships_knows_no_tests() -> None:
    for path in modules().values():
        assert "tests" not in {
            node.module.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module
        }
